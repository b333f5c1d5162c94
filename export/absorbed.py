"""SAM's mask decoder as a CPU computes it fastest: the image's cells are projected for no prompt.

From the second step on each prompt has cells of its own, thousands of them, and queries, keys and values of
all of them would cost most of the decoder. With W the projection of the cells for one head and t a token's
own projection, (W c) . t = c . (W^T t): the few tokens take the projection over, and the cells are multiplied
with them as they are. In the same way a weighted sum of cells is projected after the sum. Exact but for
rounding; the modules that are trained, and the torch reference, keep the plain form.

In a file these steps are no ``ppcr::PromptFeatureAttention``: a function's body is one order of products,
and theirs is another. The function, and with it the attention plugin, is left where an image's cells are
shared by all prompts and projected once: the first reading of the first block.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar

from torch import Tensor, nn

from kernels.reference import PROMPT_TO_IMAGE
from ppcr.model.layers import merge_heads, split_heads
from ppcr.model.mask_decoder import PromptFeatureAttention
from ppcr.model.sam import SamSegmenter

_Module = TypeVar("_Module", bound=nn.Module)


class FlatLinear(nn.Module):
    """A linear layer as the product of two plain matrices: engines add the bias while they multiply."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        """f[..., C] -> f[..., C out]"""
        return (x.flatten(0, -2) @ self.plain.weight.T + self.plain.bias).view(*x.shape[:-1], -1)


class AbsorbedAttention(nn.Module):
    """`PromptFeatureAttention` with the same weights, arguments and, up to rounding, answers."""

    def __init__(self, plain: PromptFeatureAttention) -> None:
        super().__init__()
        self.plain = plain

    def forward(
        self,
        x: Tensor,
        x_position: Tensor,
        y: Tensor,
        y_position: Tensor,
        norm: nn.LayerNorm,
        after: Tensor | None = None,
    ) -> Tensor:
        if self.plain.direction != PROMPT_TO_IMAGE:
            read = self._to_prompt(x + x_position, y, y + y_position)
        elif y.shape[1] == 1:  # shared cells are projected once for all prompts
            return self.plain(x, x_position, y, y_position, norm, after)
        else:
            read = self._to_image(x + x_position, y, y + y_position)
        closed: Tensor = norm(x + read)
        return closed if after is None else closed + after

    def _to_image(self, tokens: Tensor, cells: Tensor, placed: Tensor) -> Tensor:
        """tokens f[B, K, P, C] read cells f[B, K, N, C], found where `placed` says -> f[B, K, P, C]."""
        plain = self.plain
        queries = split_heads(plain.q(tokens), plain.heads)  # [B, K, H, P, D]
        # The keys' bias is the same for all cells: a softmax does not see it.
        asked = (_scaled(queries) @ _by_head(plain.k, plain.heads)).flatten(2, 3)  # [B, K, H * P, C]
        shares = (asked @ placed.transpose(-1, -2)).softmax(-1)
        sums = (shares @ cells).unflatten(2, (plain.heads, -1))  # [B, K, H, P, C]
        values = merge_heads(sums @ _by_head(plain.v, plain.heads).transpose(-1, -2)) + plain.v.bias
        read: Tensor = plain.out(values)
        return read

    def _to_prompt(self, placed: Tensor, tokens: Tensor, placed_tokens: Tensor) -> Tensor:
        """cells f[B, K or 1, N, C], as `placed`, read tokens f[B, K, P, C] -> f[B, K, N, C]."""
        plain, heads = self.plain, self.plain.heads
        keys = _scaled(split_heads(plain.k(placed_tokens), heads))  # [B, K, H, P, D]
        answered = (keys @ _by_head(plain.q, heads)).flatten(2, 3)  # [B, K, H * P, C]
        bias = (keys @ plain.q.bias.view(heads, -1, 1)).flatten(2)  # [B, K, H * P]
        scores = placed @ answered.transpose(-1, -2) + bias.unsqueeze(2)  # [B, K, N, H * P]
        shares = scores.unflatten(-1, (heads, -1)).softmax(-1).flatten(-2)
        out = plain.out.weight.T.unflatten(0, (heads, -1))  # [H, D, C]
        # Each head's shares sum to one, so that every head may bring its part of the bias.
        values = split_heads(plain.v(tokens), heads) @ out + plain.out.bias / heads
        read: Tensor = shares @ values.flatten(2, 3)
        return read


def absorbed(segmenter: SamSegmenter) -> SamSegmenter:
    """The same segmenter with a mask decoder of `AbsorbedAttention`; weights are shared, not copied."""
    decoder = _replaced(segmenter.mask_decoder)
    for name in ("up_0", "up_1"):
        decoder.add_module(name, FlatLinear(decoder.get_submodule(name)))  # type: ignore[arg-type]
    made = _sharing(segmenter)
    made.add_module("mask_decoder", decoder)
    return made


def _replaced(module: nn.Module) -> nn.Module:
    if isinstance(module, PromptFeatureAttention):
        return AbsorbedAttention(module)
    made = _sharing(module)
    for name, child in module.named_children():
        made.add_module(name, _replaced(child))
    return made


def _sharing(module: _Module) -> _Module:
    """A module of its own with the children and weights of ``module``."""
    made = copy.copy(module)
    made.__dict__["_modules"] = dict(module._modules)
    return made


def _by_head(layer: nn.Linear, heads: int) -> Tensor:
    """The weight of a projection to all heads, f[H, D, C]."""
    return layer.weight.unflatten(0, (heads, -1))


def _scaled(x: Tensor) -> Tensor:
    return x * (1.0 / math.sqrt(x.shape[-1]))
