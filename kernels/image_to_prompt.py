"""Image cells read prompt tokens: the whole image-side block in one kernel.

A program holds BM cells, lets every head read all tokens, and closes with the residual and the LayerNorm:
each cell comes from memory once and is written once. E expressions write E images; they may read one shared
image, which is then not repeated in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.tiles import add, dot, dot_add, dot_rows, norm, online


@triton.jit
def _close(
    acc, p_x, p_bo, p_gamma, p_beta, p_after, p_out, i_e, m, M, eps, x_group,
    C: tl.constexpr, HAS_AFTER: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, C)
    # The cells come from the cache once more: held all along, they would cost the registers of the products.
    x = tl.load(p_x + ((i_e // x_group) * M + m)[:, None] * C + c[None, :], mask=(m < M)[:, None], other=0.0)
    y = acc + tl.load(p_bo + c).to(tl.float32)[None, :] + x.to(tl.float32)
    y = norm(y, p_gamma, p_beta, eps, C)
    at = (i_e * M + m)[:, None] * C + c[None, :]
    if HAS_AFTER:
        y = y.to(x.dtype).to(tl.float32)  # torch rounds between the norm and the sum
        y += tl.load(p_after + at, mask=(m < M)[:, None], other=0.0).to(tl.float32)
    tl.store(p_out + at, y.to(p_out.dtype.element_ty), mask=(m < M)[:, None])


@triton.jit
def write_folded(
    p_x, p_position, p_folded, p_bias, p_value, p_bo, p_gamma, p_beta, p_after,
    N, M, eps, x_group, position_group, p_out,
    H: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_AFTER: tl.constexpr,
):  # fmt: skip
    """With projections folded into the tokens (see `fold_tokens`); grid (cell blocks, expressions).

    x f[E / x_group, M, C], position f[E / position_group, M, C], folded and value f[E, H, N, C], bias
    f32[E, H, N], after and out f[E, M, C]. All N tokens fit one tile of BN. Products over the C columns take
    BK at a time: where that is not all of them, the cells are read again for each head, from the cache.
    """
    i_e = tl.program_id(1).to(tl.int64)
    m, c, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, C), tl.arange(0, BN)
    cell, token = (m < M)[:, None], n < N
    x_at = p_x + ((i_e // x_group) * M + m)[:, None] * C
    place_at = p_position + ((i_e // position_group) * M + m)[:, None] * C
    if BK == C:
        x = tl.load(x_at + c[None, :], mask=cell, other=0.0)
        placed = add(x, tl.load(place_at + c[None, :], mask=cell, other=0.0))
    acc = tl.zeros([BM, C], tl.float32)
    for h in range(H):
        row = (i_e * H + h) * N + n
        bias = tl.load(p_bias + row, mask=token, other=float("-inf"))
        folded_at = p_folded + row[None, :] * C
        if BK == C:
            scores = dot(placed, tl.load(folded_at + c[:, None], mask=token[None, :], other=0.0))  # [BM, BN]
        else:
            scores = dot_rows(x_at, place_at, cell, folded_at, token[None, :], BM, BN, C, BK, True)
        scores += bias[None, :]
        top = tl.max(scores, 1)
        p = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
        total = tl.sum(p, 1)
        p = p / tl.where(total == 0.0, 1.0, total)[:, None]
        value = tl.load(p_value + row[:, None] * C + c[None, :], mask=token[:, None], other=0.0)  # [BN, C]
        acc = dot_add(p.to(value.dtype), value, acc)
    _close(acc, p_x, p_bo, p_gamma, p_beta, p_after, p_out, i_e, m, M, eps, x_group, C, HAS_AFTER)


@triton.jit
def write_heads(
    p_x, p_position, p_wq, p_bq, p_k, p_v, p_mask, p_wo, p_bo, p_gamma, p_beta, p_after,
    N, M, scale, eps, x_group, position_group, p_out,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, BLOCKS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_AFTER: tl.constexpr,
):  # fmt: skip
    """With the query and output projections inside, for any number of tokens; grid (cell blocks,
    expressions).

    k, v f[E, N, H*D], mask u8[E, N], wq f[H*D, C], wo f[C, H*D]; BLOCKS of BN tokens; the rest as in
    `write_folded`.
    """
    i_e = tl.program_id(1).to(tl.int64)
    m, c = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, C)
    cell = (m < M)[:, None]
    x_at = p_x + ((i_e // x_group) * M + m)[:, None] * C
    place_at = p_position + ((i_e // position_group) * M + m)[:, None] * C
    if BK == C:
        x = tl.load(x_at + c[None, :], mask=cell, other=0.0)
        placed = add(x, tl.load(place_at + c[None, :], mask=cell, other=0.0))
    acc = tl.zeros([BM, C], tl.float32)
    for h in range(H):
        d = h * D + tl.arange(0, D)
        wq_at = p_wq + d[None, :] * C
        if BK == C:
            q = dot(placed, tl.load(wq_at + c[:, None]))  # [BM, D]
        else:
            q = dot_rows(x_at, place_at, cell, wq_at, (d >= 0)[None, :], BM, D, C, BK, True)
        q = ((q + tl.load(p_bq + d).to(tl.float32)[None, :]) * scale).to(p_x.dtype.element_ty)
        m_i = tl.full([BM], float("-inf"), tl.float32)
        l_i = tl.zeros([BM], tl.float32)
        o = tl.zeros([BM, D], tl.float32)
        for i_n in range(BLOCKS):
            n = i_n * BN + tl.arange(0, BN)
            token = n < N
            if HAS_MASK:
                token = token & (tl.load(p_mask + i_e * N + n, mask=token, other=0) != 0)
            row = (i_e * N + n) * (H * D)
            k = tl.load(p_k + row[None, :] + d[:, None], mask=token[None, :], other=0.0)  # [D, BN]
            v = tl.load(p_v + row[:, None] + d[None, :], mask=token[:, None], other=0.0)  # [BN, D]
            scores = tl.where(token[None, :], dot(q, k), float("-inf"))
            p, before, m_i, l_i = online(scores, m_i, l_i)
            o = dot_add(p.to(v.dtype), v, o * before[:, None])
        o = o / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
        wo = tl.load(p_wo + c[None, :] * (H * D) + d[:, None])  # [D, C]
        acc = dot_add(o.to(wo.dtype), wo, acc)
    _close(acc, p_x, p_bo, p_gamma, p_beta, p_after, p_out, i_e, m, M, eps, x_group, C, HAS_AFTER)
