"""Projections of the long image side, folded into the few prompt tokens.

With q = W_q x and k = W_k y a score is x . (W_q^T k): the projection moves from the image's thousands of
cells to a handful of tokens, and the image is read as it lies in memory. The same holds for values and the
output projection. What the key's bias adds to a row of scores is the same for all keys, and a softmax ignores
it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.tiles import dot, dot_rows


@triton.jit
def fold_tokens(
    p_t, p_position, p_mask, p_w1, p_b1, p_w2, p_b2, p_wv, p_bv, p_wo, N, scale, position_stride,
    p_folded, p_bias, p_value,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_VALUES: tl.constexpr,
):  # fmt: skip
    """One head's folded rows of BT tokens, BK columns at a time; grid (heads, token blocks, expressions).

    tokens t f[E, N, C], position f[E or 1, N, C] (stride 0 when shared), mask u8[E, N], w1, w2, wv f[H*D, C],
    wo f[C, H*D] -> folded f[E, H, N, C] = scale * w2_h^T (w1_h (t + position) + b1_h), and for image to
    prompt bias f32[E, H, N] = scale * (that projection) . b2_h, -inf for padding, value f[E, H, N, C] = wo_h
    (wv_h t + bv_h).
    """
    i_h, i_e = tl.program_id(0), tl.program_id(2).to(tl.int64)
    n = tl.program_id(1) * BT + tl.arange(0, BT)
    d = i_h * D + tl.arange(0, D)
    valid = n < N
    if HAS_MASK:
        valid = valid & (tl.load(p_mask + i_e * N + n, mask=valid, other=0) != 0)
    t_at = p_t + (i_e * N + n)[:, None] * C
    place_at = p_position + i_e * position_stride + n[:, None] * C
    rows, columns = valid[:, None], (d >= 0)[None, :]
    a = dot_rows(t_at, place_at, rows, p_w1 + d[None, :] * C, columns, BT, D, C, BK, True)
    a += tl.load(p_b1 + d).to(tl.float32)[None, :]  # [BT, D]
    row = (i_e * H + i_h) * N + n
    inside = (n < N)[:, None]
    if HAS_VALUES:
        bias = tl.sum(a * tl.load(p_b2 + d).to(tl.float32)[None, :], 1) * scale
        tl.store(p_bias + row, tl.where(valid, bias, float("-inf")), mask=n < N)
        v = dot_rows(t_at, t_at, rows, p_wv + d[None, :] * C, columns, BT, D, C, BK, False)
        v = (v + tl.load(p_bv + d).to(tl.float32)[None, :]).to(p_t.dtype.element_ty)  # [BT, D]
    a = a.to(p_t.dtype.element_ty)
    for first in range(0, C, BK):
        c = first + tl.arange(0, BK)
        at = row[:, None] * C + c[None, :]
        folded = dot(a, tl.load(p_w2 + d[:, None] * C + c[None, :])) * scale  # [BT, BK]
        tl.store(p_folded + at, folded.to(p_folded.dtype.element_ty), mask=inside)
        if HAS_VALUES:
            value = dot(v, tl.load(p_wo + c[None, :] * (H * D) + d[:, None]))
            tl.store(p_value + at, value.to(p_value.dtype.element_ty), mask=inside)
