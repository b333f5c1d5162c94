"""Prompt-feature attention in plain torch: what the kernels are held to, and what runs where they do not."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PROMPT_TO_IMAGE, IMAGE_TO_PROMPT = "prompt_to_image", "image_to_prompt"
DIRECTIONS = (PROMPT_TO_IMAGE, IMAGE_TO_PROMPT)


class Weights(NamedTuple):
    """Projections as `nn.Linear` holds them, and the norm: q, k, v f[H*D, C], out f[C, H*D], norm f[C]."""

    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor
    v_weight: Tensor
    v_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def attend_and_norm(
    x: Tensor, x_position: Tensor, y: Tensor, y_position: Tensor, weights: Weights, *, direction: str,
    heads: int, eps: float, mask: Tensor | None = None, after: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """LayerNorm(x + out(attention(q(x + x_position), k(y + y_position), v(y)))) [+ after].

    Shapes: x f[B, K or 1, L, C] reads y f[B, K or 1, N, C]; a dimension of 1 is shared by an image's K
    prompts and is never copied. Positions broadcast to x and to y. Prompt tokens are x when `direction` is
    "prompt_to_image" and y when it is "image_to_prompt"; the image's cells are the other. mask bool[B, K,
    tokens], False for padding: such tokens are not read, whatever they hold, and come back as zeros; a cell
    that may read no token at all gets LayerNorm(x + out_bias). after f[B, K, L, C] is added to the result.
    Returns f[B, K, L, C] in the dtype of x.
    """
    to_image = direction == PROMPT_TO_IMAGE
    if mask is not None:
        keep = mask.unsqueeze(-1)
        if to_image:
            x, x_position = _padding_out(x, keep), _padding_out(x_position, keep)
        else:
            y, y_position = _padding_out(y, keep), _padding_out(y_position, keep)
    q = split_heads(F.linear(x + x_position, weights.q_weight, weights.q_bias), heads)
    k = split_heads(F.linear(y + y_position, weights.k_weight, weights.k_bias), heads)
    v = split_heads(F.linear(y, weights.v_weight, weights.v_bias), heads)
    scores = (q * (1.0 / math.sqrt(q.shape[-1]))) @ k.transpose(-1, -2)
    if mask is not None and not to_image:
        readable = mask[:, :, None, None, :]
        scores = scores.masked_fill(~readable, float("-inf"))
        # A row without a readable token would be 0/0.
        shares = scores.softmax(-1).masked_fill(~readable.any(-1, keepdim=True), 0.0)
    else:
        shares = scores.softmax(-1)
    read = F.linear((shares @ v).transpose(-2, -3).flatten(-2), weights.out_weight, weights.out_bias)
    out = layer_norm(x + read, weights.norm_weight, weights.norm_bias, eps)
    if mask is not None and to_image:
        out = _padding_out(out, keep)
    return out if after is None else out + after


def split_heads(x: Tensor, heads: int) -> Tensor:
    """f[..., N, H*D] -> f[..., H, N, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def _padding_out(x: Tensor, keep: Tensor) -> Tensor:
    # Not a product: padding may hold infinities, or whatever was in memory.
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype, device=x.device))


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, in fp32 on fp16 input, whose squares would overflow."""
    if x.dtype == torch.float16:
        return F.layer_norm(x.float(), gamma.shape, gamma.float(), beta.float(), eps).to(x.dtype)
    return F.layer_norm(x, gamma.shape, gamma, beta, eps)
