"""Attention over many conversations about one image, at the cost of what they may attend to.

A training sequence is an image prefix followed by slots of fixed lengths, a conversation in each. A token
attends to the prefix and to what came before it in its own slot. Dense attention over such a sequence spends
most of its time on scores that the mask throws away; here they are never computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SLOTS = "ppcr_slots"
"""Name of ``slot_attention`` among transformers' attention implementations."""


@dataclass(frozen=True)
class Layout:
    """Where the conversations of a sequence stand.

    Attributes:
        prefix: tokens of the image prefix, at the front.
        slots: (how many, of which length) in the order they stand.
    """

    prefix: int
    slots: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return self.prefix + sum(count * length for count, length in self.slots)

    @property
    def places(self) -> list[tuple[int, int]]:
        """(first token, length) of each slot."""
        found, at = [], self.prefix
        for count, length in self.slots:
            found += [(at + i * length, length) for i in range(count)]
            at += count * length
        return found


def slot_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Layout, **_: object
) -> tuple[Tensor, None]:
    """Attention of a laid-out sequence, as matrix products in the inputs' precision.

    Shapes as transformers' attention functions: query [B, H, T, D], key and value [B, H_kv, T, D], returns
    [B, T, H, D]. The layout travels where a mask would. On a CPU in bf16, plain products train 2.4 times
    faster than ``scaled_dot_product_attention``, whose backward there is slow.
    """
    layout = attention_mask
    prefix = layout.prefix
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    query = query.reshape(batch, groups, heads // groups, length, width) * width**-0.5

    def own(queries: Tensor, keys: Tensor) -> Tensor:
        """Causal scores [B, G, n, heads * L, L] of n slots among themselves."""
        length = keys.shape[-2]
        scores = queries.flatten(3, 4) @ keys.transpose(-1, -2)
        causal = _causal(length, scores.dtype, scores.device)
        return (scores.unflatten(3, (-1, length)) + causal).flatten(3, 4)

    front_k, front_v = key[:, :, :prefix], value[:, :, :prefix]
    scores = own(query[:, :, None, :, :prefix], front_k[:, :, None])
    mixed = scores.softmax(-1).to(value.dtype) @ front_v[:, :, None]
    parts = [mixed.view(batch, heads, prefix, width)]
    at = prefix
    for count, length in ((count, length) for count, length in layout.slots if count):
        end = at + count * length
        slot_q = query[:, :, :, at:end].unflatten(3, (count, length)).transpose(2, 3)  # [B, G, n, h, L, D]
        slot_k, slot_v = (t[:, :, at:end].unflatten(2, (count, length)) for t in (key, value))
        to_front = (slot_q.flatten(2, 4) @ front_k.transpose(-1, -2)).unflatten(2, (count, -1))
        shares = torch.cat([to_front, own(slot_q, slot_k)], -1).softmax(-1).to(value.dtype)
        front_part = (shares[..., :prefix].flatten(2, 3) @ front_v).unflatten(2, (count, -1))
        mixed = front_part + shares[..., prefix:] @ slot_v  # [B, G, n, h * L, D]
        mixed = mixed.unflatten(3, (-1, length)).transpose(2, 3)
        parts.append(mixed.reshape(batch, heads, count * length, width))
        at = end
    return torch.cat(parts, 2).transpose(1, 2), None


@cache
def _causal(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask [length, length]."""
    return torch.full((length, length), -1e4, dtype=dtype, device=device).triu_(1)


ALL_ATTENTION_FUNCTIONS.register(SLOTS, slot_attention)
