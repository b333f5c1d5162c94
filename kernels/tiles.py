"""What the Triton kernels share: products, the step of an online softmax, and the closing LayerNorm."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton's interpreter multiplies bf16 bit patterns as integers, and fp32 exactly whatever it is asked for.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b):
    """a[..., M, K] @ b[..., K, N] -> fp32[..., M, N], on tensor cores.

    fp32 operands are multiplied as sums of two TF32 numbers in three products (``tf32x3``): that of the two
    small parts, 2^-22 of the whole, is left out.
    """
    if _INTERPRETED:
        return _interpreted(a, b)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def dot_add(a, b, c):
    """a[M, K] @ b[K, N] + c fp32[M, N], as in `dot`."""
    if _INTERPRETED:
        return _interpreted(a, b) + c
    return tl.dot(a, b, c, input_precision="tf32x3")


@triton.jit
def _interpreted(a, b):
    """What the hardware computes: in the interpreter, so that its error is that of the three products."""
    if a.dtype == tl.float32:
        a_big, b_big = _tf32(a), _tf32(b)
        # The hardware reads the first 19 bits of an operand and ignores the others.
        a_small, b_small = _cut(a - a_big), _cut(b - b_big)
        return tl.dot(a_small, b_big) + tl.dot(a_big, b_small) + tl.dot(a_big, b_big)
    return tl.dot(a.to(tl.float32), b.to(tl.float32))


@triton.jit
def _tf32(x):
    """fp32 rounded to the nearest number of ten bits after the point, ties away from zero."""
    return _cut((x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True))


@triton.jit
def _cut(x):
    return (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def dot_rows(
    a_at, place_at, rows, b_at, columns,
    R: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    """(a + place)[R, C] @ b[N, C]^T -> fp32[R, N], read from memory in BK columns at a time.

    a_at and place_at [R, 1] and b_at [1, N] point at the beginnings of rows; rows [R, 1] and columns [1, N]
    say which are there. Wide fp32 rows would not fit the registers whole.
    """
    out = tl.zeros([R, N], tl.float32)
    for first in range(0, C, BK):
        c = first + tl.arange(0, BK)
        a = tl.load(a_at + c[None, :], mask=rows, other=0.0)
        if PLACED:
            a = add(a, tl.load(place_at + c[None, :], mask=rows, other=0.0))
        out = dot_add(a, tl.load(b_at + c[:, None], mask=columns, other=0.0), out)
    return out


@triton.jit
def add(a, b):
    """The sum of two tiles, rounded to their own dtype as torch rounds it."""
    return (a.to(tl.float32) + b.to(tl.float32)).to(a.dtype)


@triton.jit
def online(scores, top, total):
    """One step of a softmax over log2 scores [R, S], with the maximum and sum so far, top[R] and total[R].

    Returns shares relative to the new maximum, the factor for what was summed before, and the new top and
    total. A row that has met nothing but -inf keeps zero shares.
    """
    highest = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.exp2(scores - safe[:, None])
    before = tl.exp2(top - safe)
    return p, before, highest, total * before + tl.sum(p, 1)


@triton.jit
def norm(y, p_gamma, p_beta, eps, C: tl.constexpr):
    """LayerNorm in fp32 of the rows of y [R, C]."""
    c = tl.arange(0, C)
    y = y - (tl.sum(y, 1) / C)[:, None]
    scale = tl.rsqrt(tl.sum(y * y, 1) / C + eps)
    gamma = tl.load(p_gamma + c).to(tl.float32)
    beta = tl.load(p_beta + c).to(tl.float32)
    return y * scale[:, None] * gamma[None, :] + beta[None, :]
