"""What the Triton kernels share: products, the step of an online softmax, and the closing LayerNorm."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# Triton's interpreter multiplies bf16 bit patterns as integers; there, and only there, products are in fp32.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b):
    """a[M, K] @ b[K, N] -> fp32[M, N]; fp32 operands are multiplied exactly, not as TF32."""
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def dot_add(a, b, c):
    """a[M, K] @ b[K, N] + c fp32[M, N]"""
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


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
