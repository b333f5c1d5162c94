"""Projections of the long image side, folded into the few prompt tokens.

With q = W_q x and k = W_k y a score is x . (W_q^T k): the projection moves from the image's thousands of
cells to a handful of tokens, and the image is read as it lies in memory. The same holds for values and the
output projection. What the key's bias adds to a row of scores is the same for all keys, and a softmax ignores
it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.tiles import add, dot


@triton.jit
def fold_tokens(
    p_t, p_position, p_mask, p_w1, p_b1, p_w2, p_b2, p_wv, p_bv, p_wo, p_folded, p_bias, p_value,
    N, scale, position_stride,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BT: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_VALUES: tl.constexpr,
):  # fmt: skip
    """One head's folded rows of BT tokens; grid (heads, token blocks, expressions).

    tokens t f[E, N, C], position f[E or 1, N, C] (stride 0 when shared), mask u8[E, N], w1, w2, wv f[H*D, C],
    wo f[C, H*D] -> folded f[E, H, N, C] = scale * w2_h^T (w1_h (t + position) + b1_h), and for image to
    prompt bias f32[E, H, N] = scale * (that projection) . b2_h, -inf for padding, value f[E, H, N, C] = wo_h
    (wv_h t + bv_h).
    """
    i_h, i_e = tl.program_id(0), tl.program_id(2).to(tl.int64)
    n = tl.program_id(1) * BT + tl.arange(0, BT)
    c, d = tl.arange(0, C), i_h * D + tl.arange(0, D)
    valid = n < N
    if HAS_MASK:
        valid = valid & (tl.load(p_mask + i_e * N + n, mask=valid, other=0) != 0)
    t = tl.load(p_t + (i_e * N + n)[:, None] * C + c[None, :], mask=valid[:, None], other=0.0)  # [BT, C]
    place = tl.load(
        p_position + i_e * position_stride + n[:, None] * C + c[None, :], mask=valid[:, None], other=0.0
    )
    w1 = tl.load(p_w1 + d[None, :] * C + c[:, None])  # [C, D]
    a = dot(add(t, place), w1) + tl.load(p_b1 + d).to(tl.float32)[None, :]  # [BT, D]
    w2 = tl.load(p_w2 + d[:, None] * C + c[None, :])  # [D, C]
    folded = dot(a.to(t.dtype), w2) * scale  # [BT, C]
    row = (i_e * H + i_h) * N + n
    inside = (n < N)[:, None]
    tl.store(p_folded + row[:, None] * C + c[None, :], folded.to(p_folded.dtype.element_ty), mask=inside)
    if HAS_VALUES:
        bias = tl.sum(a * tl.load(p_b2 + d).to(tl.float32)[None, :], 1) * scale
        tl.store(p_bias + row, tl.where(valid, bias, float("-inf")), mask=n < N)
        wv = tl.load(p_wv + d[None, :] * C + c[:, None])  # [C, D]
        v = dot(t, wv) + tl.load(p_bv + d).to(tl.float32)[None, :]  # [BT, D]
        wo = tl.load(p_wo + c[None, :] * (H * D) + d[:, None])  # [D, C]
        value = dot(v.to(t.dtype), wo)
        tl.store(p_value + row[:, None] * C + c[None, :], value.to(p_value.dtype.element_ty), mask=inside)
