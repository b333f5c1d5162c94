"""The prompt tokens' own steps: attention among themselves, and the MLP, each with residual and norm.

Both are small enough that starting kernels costs more than running them: each is one kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.tiles import add, dot, dot_add, dot_rows, norm


@triton.jit
def attend_tokens(
    p_x, p_position, p_wq, p_bq, p_wk, p_bk, p_wv, p_bv, p_wo, p_bo, p_gamma, p_beta, p_out,
    N, scale, eps, position_stride,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """LayerNorm(x + out(attention among N tokens)); grid (expressions,).

    x, out f[E, N, C]; position f[E or 1, N, C] (stride 0 when shared) is added to queries and keys; wq, wk,
    wv f[H*D, C], wo f[C, H*D]. All N tokens fit one tile of BN. Projections take BK columns at a time: where
    that is not all of them, the tokens are read again for each, from the cache.
    """
    i_e = tl.program_id(0).to(tl.int64)
    n, c = tl.arange(0, BN), tl.arange(0, C)
    token = (n < N)[:, None]
    x_at, place_at = p_x + i_e * N * C + n[:, None] * C, p_position + i_e * position_stride + n[:, None] * C
    if BK == C:
        x = tl.load(x_at + c[None, :], mask=token, other=0.0)  # [BN, C]
        placed = add(x, tl.load(place_at + c[None, :], mask=token, other=0.0))
    acc = tl.zeros([BN, C], tl.float32)
    for h in range(H):
        d = h * D + tl.arange(0, D)
        if BK == C:
            column = d[None, :] * C + c[:, None]  # [C, D]
            q = dot(placed, tl.load(p_wq + column))
            k = dot(placed, tl.load(p_wk + column))
            v = dot(x, tl.load(p_wv + column))
        else:
            row, every = d[None, :] * C, (d >= 0)[None, :]
            q = dot_rows(x_at, place_at, token, p_wq + row, every, BN, D, C, BK, True)
            k = dot_rows(x_at, place_at, token, p_wk + row, every, BN, D, C, BK, True)
            v = dot_rows(x_at, place_at, token, p_wv + row, every, BN, D, C, BK, False)
        q += tl.load(p_bq + d).to(tl.float32)[None, :]
        k += tl.load(p_bk + d).to(tl.float32)[None, :]
        v += tl.load(p_bv + d).to(tl.float32)[None, :]
        scores = dot((q * scale).to(p_x.dtype.element_ty), tl.trans(k.to(p_x.dtype.element_ty)))  # [BN, BN]
        scores = tl.where((n < N)[None, :], scores, float("-inf"))
        p = tl.exp2(scores - tl.max(scores, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]
        o = dot(p.to(p_x.dtype.element_ty), v.to(p_x.dtype.element_ty))
        wo = tl.load(p_wo + c[None, :] * (H * D) + d[:, None])  # [D, C]
        acc = dot_add(o.to(wo.dtype), wo, acc)
    if BK != C:
        x = tl.load(x_at + c[None, :], mask=token, other=0.0)
    y = acc + tl.load(p_bo + c).to(tl.float32)[None, :] + x.to(tl.float32)
    y = norm(y, p_gamma, p_beta, eps, C)
    at = n[:, None] * C + c[None, :]
    tl.store(p_out + i_e * N * C + at, y.to(p_out.dtype.element_ty), mask=token)


@triton.jit
def mlp_tokens(
    p_x, p_w1, p_b1, p_w2, p_b2, p_gamma, p_beta, p_out, rows, eps,
    C: tl.constexpr, HIDDEN: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """LayerNorm(x + w2 relu(w1 x)); grid (row blocks,).

    x, out f[rows, C], w1 f[HIDDEN, C], w2 f[C, HIDDEN]; BJ hidden columns at a time, none of them stored,
    each a product over C in steps of BK.
    """
    r = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.arange(0, C)
    inside = (r < rows)[:, None]
    row = r.to(tl.int64)[:, None] * C
    if BK == C:
        x = tl.load(p_x + row + c[None, :], mask=inside, other=0.0)  # [BT, C]
    acc = tl.zeros([BT, C], tl.float32)
    for first in range(0, HIDDEN, BJ):
        j = first + tl.arange(0, BJ)
        w1_at = p_w1 + j[None, :] * C
        if BK == C:
            hidden = dot(x, tl.load(w1_at + c[:, None]))  # [BT, BJ]
        else:
            hidden = dot_rows(p_x + row, p_x + row, inside, w1_at, (j >= 0)[None, :], BT, BJ, C, BK, False)
        hidden = tl.maximum(hidden + tl.load(p_b1 + j).to(tl.float32)[None, :], 0.0)
        w2 = tl.load(p_w2 + c[None, :] * HIDDEN + j[:, None])  # [BJ, C]
        acc = dot_add(hidden.to(w2.dtype), w2, acc)
    if BK != C:
        x = tl.load(p_x + row + c[None, :], mask=inside, other=0.0)
    y = acc + tl.load(p_b2 + c).to(tl.float32)[None, :] + x.to(tl.float32)
    y = norm(y, p_gamma, p_beta, eps, C)
    tl.store(p_out + row + c[None, :], y.to(p_out.dtype.element_ty), mask=inside)
