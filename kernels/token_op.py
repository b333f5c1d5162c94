"""The prompt tokens' own steps as two ops, chosen like the attention's: see `kernels.op` for the modes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import op
from kernels.plan import ceil, fits, most_tokens, token_variants
from kernels.reference import Weights, layer_norm, split_heads
from kernels.schedule import LOG2_E


def token_attention(x: Tensor, position: Tensor, weights: Weights, *, heads: int, eps: float) -> Tensor:
    """LayerNorm(x + out(attention(q(x + position), k(x + position), v(x)))) among an expression's tokens.

    x f[B, K, N, C], position like x or f[N, C] -> f[B, K, N, C]; q, k and v f[C, C].
    """
    if op.takes((x, position, *weights)) and _fits_attention(x, heads):
        out: Tensor = _attend(x, position, *weights, heads, eps)
        return out
    return _attend_reference(x, position, weights, heads, eps)


def token_mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, norm: tuple[Tensor, Tensor], *, eps: float
) -> Tensor:
    """LayerNorm(x + w2 relu(w1 x + b1) + b2): x f[..., C], w1 f[hidden, C], w2 f[C, hidden] -> f[..., C]."""
    if op.takes((x, w1, b1, w2, b2, *norm)) and _fits_mlp(x, w1):
        out: Tensor = _mlp(x, w1, b1, w2, b2, *norm, eps)
        return out
    return _mlp_reference(x, w1, b1, w2, b2, *norm, eps)


def _fits_attention(x: Tensor, heads: int) -> bool:
    *_, tokens, dim = x.shape
    return fits(dim, heads, dim // heads) and tokens <= most_tokens(dim, x.element_size())


def _fits_mlp(x: Tensor, w1: Tensor) -> bool:
    hidden = w1.shape[0]
    return fits(x.shape[-1], 1, 16) and hidden >= 32 and hidden & (hidden - 1) == 0


def _attend_reference(x: Tensor, position: Tensor, w: Weights, heads: int, eps: float) -> Tensor:
    placed = x + position
    q = split_heads(F.linear(placed, w.q_weight, w.q_bias), heads)
    k = split_heads(F.linear(placed, w.k_weight, w.k_bias), heads)
    v = split_heads(F.linear(x, w.v_weight, w.v_bias), heads)
    shares = ((q * (1.0 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)).softmax(-1)
    read = F.linear((shares @ v).transpose(-2, -3).flatten(-2), w.out_weight, w.out_bias)
    return layer_norm(x + read, w.norm_weight, w.norm_bias, eps)


def _mlp_reference(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> Tensor:
    return layer_norm(x + F.linear(F.linear(x, w1, b1).relu(), w2, b2), gamma, beta, eps)


@torch.library.custom_op("ppcr::token_attention", mutates_args=())
def _attend(
    x: Tensor, position: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor,
    v_weight: Tensor, v_bias: Tensor, out_weight: Tensor, out_bias: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, heads: int, eps: float,
) -> Tensor:  # fmt: skip
    weights = Weights(
        q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, out_weight, out_bias, norm_weight, norm_bias
    )
    if op.runs_on(x) and _fits_attention(x, heads):
        return attend_on_kernel(x, position, weights, heads, eps)
    return _attend_reference(x, position, weights, heads, eps).contiguous()


@torch.library.custom_op("ppcr::token_mlp", mutates_args=())
def _mlp(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> Tensor:
    if op.runs_on(x) and _fits_mlp(x, w1):
        return mlp_on_kernel(x, w1, b1, w2, b2, gamma, beta, eps)
    return _mlp_reference(x, w1, b1, w2, b2, gamma, beta, eps).contiguous()


def attend_on_kernel(x: Tensor, position: Tensor, weights: Weights, heads: int, eps: float) -> Tensor:
    """`token_attention` on the Triton kernel."""
    from kernels.token_blocks import attend_tokens

    *batch, n, c = x.shape
    x, common = x.contiguous(), position.numel() == n * c
    position = position.contiguous() if common else position.expand_as(x).contiguous()
    out = torch.empty_like(x)
    scale = LOG2_E / math.sqrt(c // heads)
    variant = token_variants(n, c, heads, c, x.element_size())["attend"]
    attend_tokens[(math.prod(batch),)](
        x, position, *(w.contiguous() for w in weights), out, n, scale, eps, 0 if common else n * c,
        **variant.options,
    )  # fmt: skip
    return out


def mlp_on_kernel(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> Tensor:
    """`token_mlp` on the Triton kernel."""
    from kernels.token_blocks import mlp_tokens

    x, c = x.contiguous(), x.shape[-1]
    out, rows = torch.empty_like(x), x.numel() // c
    variant = token_variants(x.shape[-2], c, 1, w1.shape[0], x.element_size())["mlp"]
    weights = (w.contiguous() for w in (w1, b1, w2, b2, gamma, beta))
    mlp_tokens[(ceil(rows, variant.constants["BT"]),)](x, *weights, out, rows, eps, **variant.options)
    return out


@_attend.register_fake
def _attend_shape(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


@_mlp.register_fake
def _mlp_shape(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.settings = tuple(value for value in inputs if not isinstance(value, Tensor))


def _attend_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    def forward(x: Tensor, position: Tensor, *weights: Tensor) -> Tensor:
        return _attend_reference(x, position, Weights(*weights), *ctx.settings)

    pull_back = torch.func.vjp(forward, *ctx.saved_tensors)[1]
    return (*pull_back(gradient), None, None)


def _mlp_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    def forward(*given: Tensor) -> Tensor:
        x, w1, b1, w2, b2, gamma, beta = given
        return _mlp_reference(x, w1, b1, w2, b2, gamma, beta, *ctx.settings)

    pull_back = torch.func.vjp(forward, *ctx.saved_tensors)[1]
    return (*pull_back(gradient), None)


_attend.register_autograd(_attend_backward, setup_context=_save)
_mlp.register_autograd(_mlp_backward, setup_context=_save)
