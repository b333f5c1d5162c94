"""The text decoder of a Qwen2.5-VL or Qwen3-VL in torch, on a static KV cache; one token is one CUDA graph.

It takes the stock model's weights and computes what the stock model does, but in few, fixed steps: queries,
keys and values are one product, the cache is written in place, and a token is given to it as two numbers, its
id and its position. Embedding, rotary tables and mask are looked up on the device from these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppcr.manifest import Shapes
from runtime.positions import Tables
from runtime.torch_graph import record


@dataclass(frozen=True)
class DeviceTables:
    """`runtime.positions.Tables` where the model lies: cos and sin f[length, head_dim / 2]."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, tables: Tables, like: Tensor) -> DeviceTables:
        """On the device, and in the type, of ``like``."""
        cos, sin = (torch.from_numpy(part).to(like) for part in (tables.cos, tables.sin))
        return cls(cos, sin)


@dataclass(frozen=True)
class _Layer:
    """One layer; matrices of one input are one under the other. head_norms: Qwen3's, of queries and keys."""

    norm: Any
    qkv: tuple[Tensor, Tensor | None]
    head_norms: tuple[Any, Any] | None
    out: tuple[Tensor, Tensor | None]
    mlp_norm: Any
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        return cls(
            layer.input_layernorm,
            _stacked(attention.q_proj, attention.k_proj, attention.v_proj),
            norms,
            _stacked(attention.o_proj),
            layer.post_attention_layernorm,
            _stacked(mlp.gate_proj, mlp.up_proj),
            _stacked(mlp.down_proj),
        )


class TorchDecoder:
    """The decoder of a stock model, which it takes apart: the model's own text layers are gone afterwards.

    Args:
        model: in evaluation mode, on one device, in one type. shapes: of the bundle.
    """

    def __init__(self, model: Any, shapes: Shapes) -> None:
        language = model.model.language_model
        self.shapes = shapes
        self.table: Tensor = language.embed_tokens.weight.detach()
        self._head, self._norm = model.lm_head.weight.detach(), language.norm
        self._layers = []
        for index, layer in enumerate(language.layers):
            self._layers.append(_Layer.of(layer))
            language.layers[index] = nn.Identity()  # one layer at a time is held twice
        self._eps = float(language.norm.variance_epsilon)

    def cache(self, length: int | None = None) -> Tensor:
        """A KV cache of zeros, f[layers, 2, kv_heads, length, head_dim]; length: default: the bundle's.

        Zeros, not garbage: a masked position still meets a weight of 0, and 0 times NaN is NaN.
        """
        s = self.shapes
        return self.table.new_zeros(s.layers, 2, s.kv_heads, length or s.max_length, s.head_dim)

    def run(
        self,
        ids: Tensor,
        at: Tensor,
        cache: Tensor,
        tables: DeviceTables,
        places: Tensor | None = None,
        features: Tensor | None = None,
        guesses: int = 0,
    ) -> Tensor:
        """A block of any length; logits f32 [1 + guesses, vocabulary] after its last tokens.

        ids, at: int64 [S], tokens and their positions in the cache, which is updated in place. ``features``
        f[1 + levels, n, hidden] stand for the tokens at ``places`` int64 [n] of the block; those of the
        levels are added after the first layers (DeepStack).
        """
        mask = torch.arange(cache.shape[3], device=at.device) <= at.unsqueeze(1)
        x = self._read(ids, at, at, mask, cache, tables, places, features)
        return self._answer(x[-1 - guesses :])

    def run_branches(
        self,
        ids: Tensor,
        at: Tensor,
        start: int,
        mask: Tensor,
        last: Tensor,
        cache: Tensor,
        tables: DeviceTables,
    ) -> Tensor:
        """The tokens of a `runtime.branches.Block`; logits f32 [n, vocabulary] after those of ``last``.

        ids, at: int64 [S], tokens and their positions in their own conversations; their keys and values go
        into the cache's slots from ``start`` on. mask: bool [S, length]. last: int64 [n].
        """
        slots = torch.arange(start, start + len(ids), device=ids.device)
        return self._answer(self._read(ids, at, slots, mask, cache, tables)[last])

    def _read(
        self,
        ids: Tensor,
        at: Tensor,
        slots: Tensor,
        mask: Tensor,
        cache: Tensor,
        tables: DeviceTables,
        places: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """Hidden states f[S, hidden] of a block after all layers."""
        x = F.embedding(ids, self.table)
        if places is not None and features is not None:
            x = x.index_copy(0, places, features[0])
        cos, sin = tables.cos[at].unsqueeze(1), tables.sin[at].unsqueeze(1)
        for index, layer in enumerate(self._layers):
            x = x + self._attend(layer, x, cache[index], slots, (cos, sin), mask)
            gate, up = F.linear(self._normed(layer.mlp_norm, x), *layer.gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, *layer.down)
            if places is not None and features is not None and index + 1 < len(features):
                x = x.index_add(0, places, features[index + 1])
        return x

    def _answer(self, x: Tensor) -> Tensor:
        return F.linear(self._normed(self._norm, x), self._head).float()

    def _attend(
        self,
        layer: _Layer,
        x: Tensor,
        cache: Tensor,
        slots: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Tensor,
    ) -> Tensor:
        s, count = self.shapes, len(x)
        y = F.linear(self._normed(layer.norm, x), *layer.qkv).unflatten(-1, (-1, s.head_dim))  # [S, all, D]
        heads = y.shape[1] - 2 * s.kv_heads
        q, k, v = y.split((heads, s.kv_heads, s.kv_heads), dim=1)
        if layer.head_norms is not None:
            q, k = (self._normed(norm, z) for norm, z in zip(layer.head_norms, (q, k), strict=True))
        q, k = _turned(q, *turn), _turned(k, *turn)
        cache[0].index_copy_(1, slots, k.transpose(0, 1))
        cache[1].index_copy_(1, slots, v.transpose(0, 1))
        # Queries that share keys lie under each other, as if they were of more tokens: no key is repeated.
        group = heads // s.kv_heads
        q = q.transpose(0, 1).reshape(1, s.kv_heads, group * count, s.head_dim)
        y = F.scaled_dot_product_attention(q, cache[None, 0], cache[None, 1], mask.repeat(group, 1))
        return F.linear(y.reshape(heads, count, s.head_dim).transpose(0, 1).flatten(1), *layer.out)

    def _normed(self, norm: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], norm.weight, self._eps)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x f[S, heads, D], cos and sin f[S, 1, D / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _stacked(*layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of linear layers of one input, one under the other."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    return weight, torch.cat(biases) if biases else None


class TorchSlot:
    """A KV cache and both ways to extend it: one token, on a GPU as a CUDA graph, and blocks of any length.

    The graph holds the addresses of this cache and of these tables: a slot keeps both for life.
    """

    def __init__(self, decoder: TorchDecoder, tables: DeviceTables, *, graph: bool) -> None:
        self._decoder, self.tables = decoder, tables
        self._cache = decoder.cache()
        self._token = torch.zeros(2, dtype=torch.int64, device=self._cache.device)  # id, position
        # Page-locked: the GPU copies from and to it without the processor.
        pinned = self._cache.is_cuda
        self._staged = torch.zeros(2, dtype=torch.int64, pin_memory=pinned)
        self._answer = torch.zeros(decoder.shapes.vocabulary, pin_memory=pinned)
        # It writes position 0, which every conversation writes again.
        self._recorded = record(self._run_step, "the decoding step") if graph else None

    @property
    def capacity(self) -> int:
        """Tokens the cache can hold."""
        return self._cache.shape[3]

    @property
    def has_graph(self) -> bool:
        """Whether single tokens are one launch."""
        return self._recorded is not None

    def step(self, token: int, at: int) -> Tensor:
        """One token; logits f32 [vocabulary] on the host, overwritten by the next call."""
        self._staged[0], self._staged[1] = token, at
        self._token.copy_(self._staged, non_blocking=True)
        return self._fetch(self._run_step() if self._recorded is None else self._recorded.replay())

    def block(
        self,
        ids: Tensor,
        start: int,
        places: Tensor | None,
        features: Tensor | None,
        guesses: int = 0,
    ) -> Tensor:
        """Tokens int64 [S] from position ``start``; as `TorchDecoder.run`, but on the host.

        Without guesses f32 [vocabulary], overwritten as `step` does.
        """
        at = torch.arange(start, start + len(ids), device=ids.device)
        logits = self._decoder.run(ids, at, self._cache, self.tables, places, features, guesses)
        return logits.cpu() if guesses else self._fetch(logits)

    def snapshot(self, length: int) -> Tensor:
        """A copy of the keys and values of the first ``length`` tokens."""
        return self._cache[:, :, :, :length].clone()

    def restore(self, held: Tensor) -> None:
        """Begin with the keys and values of `snapshot`."""
        self._cache[:, :, :, : held.shape[3]] = held

    def _fetch(self, logits: Tensor) -> Tensor:
        self._answer.copy_(logits[0], non_blocking=True)
        if logits.is_cuda:
            torch.cuda.current_stream().synchronize()
        return self._answer

    def _run_step(self) -> Tensor:
        return self._decoder.run(self._token[:1], self._token[1:], self._cache, self.tables)
