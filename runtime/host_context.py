"""A conversation whose tables, tokens and KV cache lie in the host's memory: what engines of CPUs share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ppcr.manifest import Shapes
from ppcr.tensors import RowTable
from runtime.contexts import FilledContext
from runtime.positions import Int64Array, Tables
from runtime.session import Float32Array

Cache = dict[tuple[str, int], npt.NDArray[Any]]
"""Keys and values, f[1, kv_heads, length, head_dim], by ("k" or "v", layer): layer by layer, keys first."""


@dataclass(frozen=True)
class HostDecoder:
    """What the host has of a decoder, whatever computes it.

    Attributes:
        tables: positions of conversations about images of one size. embedding: f32 [vocabulary, hidden].
        image_token: id of the tokens that stand for an image's features.
    """

    shapes: Shapes
    tables: Tables
    embedding: Float32Array | RowTable
    image_token: int


class HostContext(FilledContext):
    """`runtime.session.Context`, and of `VerifyingContext` the method, but for the engine's own part.

    An engine fills in `_launch_step`, which reads the token in ``_step`` as number ``_at`` into the cache and
    leaves its logits in ``_logits``; and `_read_block`.

    Args:
        floats: numpy's type of what the engine is fed.
    """

    def __init__(self, host: HostDecoder, length: int, floats: Any = np.float32) -> None:
        shapes, tables = host.shapes, host.tables
        self._host, self._capacity, self._shapes = host, length, shapes
        half = shapes.head_dim // 2
        self._logits = np.zeros((1, 1, shapes.vocabulary), np.float32)
        self._at = np.zeros(1, np.int64)
        self._cos, self._sin = tables.cos.astype(floats, copy=False), tables.sin.astype(floats, copy=False)
        self._embeds = np.zeros((length, shapes.hidden), floats)
        self._levels = np.zeros((shapes.deepstack, length, shapes.hidden), floats)
        nothing = np.zeros((1, 1, shapes.hidden), floats)
        self._step = {
            "inputs_embeds": np.zeros((1, 1, shapes.hidden), floats),
            "rope_cos": np.zeros((1, 1, half), floats),
            "rope_sin": np.zeros((1, 1, half), floats),
            "attn_mask": np.zeros((1, 1, 1, length), np.bool_),
            "logits_index": np.zeros(1, np.int64),
            **{f"deepstack_{level}": nothing for level in range(shapes.deepstack)},
        }
        self._mask = tables.mask if length == len(tables.mask) else tables.mask[:length, :length].copy()
        self._cache = empty_cache(shapes, length, floats)

    @property
    def capacity(self) -> int:
        """Tokens the cache can hold."""
        return self._capacity

    def snapshot(self) -> Cache:
        """Copies of the keys and values held."""
        return {place: memory[:, :, : self._length].copy() for place, memory in self._cache.items()}

    def restore(self, snapshot: Cache, length: int) -> None:
        """Begin with the keys and values of ``length`` tokens that another context has computed."""
        for place, memory in self._cache.items():
            memory[:, :, :length] = snapshot[place]
        self._length = length

    def extend(self, token_ids: Sequence[int], features: Float32Array | None = None) -> Float32Array:
        """Run a block; logits f32 [vocabulary] after its last token, overwritten by the next call."""
        count, start = len(token_ids), self._begin(token_ids)
        if count == 1 and features is None and token_ids[0] != self._host.image_token:
            step = self._step
            step["inputs_embeds"][0, 0] = self._host.embedding[token_ids[0]]
            step["rope_cos"][0, 0] = self._cos[start]
            step["rope_sin"][0, 0] = self._sin[start]
            step["attn_mask"][0, 0, 0] = self._mask[start]
            self._launch_step()
        else:
            self._read_block(np.asarray(token_ids, np.int64), start, features, None)
        self._length = start + count
        return self._logits[0, 0]

    def verify(
        self, token_ids: Sequence[int], guesses: int, features: Float32Array | None = None
    ) -> Float32Array:
        """Run a block; logits f32 [1 + guesses, vocabulary] after the last token that is no guess, and on."""
        count, start = len(token_ids), self._begin(token_ids)
        if not 0 <= guesses < count:
            raise ValueError(f"{guesses} guesses in a block of {count} tokens: one at least is none")
        answers = np.zeros((1, 1 + guesses, self._shapes.vocabulary), np.float32)
        self._read_block(np.asarray(token_ids, np.int64), start, features, answers)
        self._length = start + count
        return answers[0]

    def _launch_step(self) -> None:
        raise NotImplementedError

    def _read_block(
        self, ids: Int64Array, start: int, features: Float32Array | None, answers: Float32Array | None
    ) -> None:
        """Read tokens from position ``start`` on.

        ``answers`` f32 [1, n, vocabulary] gets the logits after the last n of them; None: ``_logits`` those
        after the last.
        """
        raise NotImplementedError

    def _begin(self, token_ids: Sequence[int]) -> int:
        """Where these tokens go. Raises ValueError when they do not fit."""
        count, start = len(token_ids), self._length
        if not 0 < count <= self._capacity - start:
            raise ValueError(f"{count} tokens do not fit after {start} of a context of {self._capacity}")
        self._at[0] = start
        return start

    def _embed(self, ids: Int64Array, features: Float32Array | None) -> tuple[npt.NDArray[Any], ...]:
        """Embeddings f[S, hidden] of a block; what is added after the first layers, f[levels, S, hidden]."""
        embeds, levels = self._embeds[: len(ids)], self._levels[:, : len(ids)]
        embeds[:] = self._host.embedding[ids]
        levels[:] = 0
        places = np.flatnonzero(ids == self._host.image_token)
        held = 0 if features is None else features.shape[-2]
        if len(places) != held:
            raise ValueError(f"{len(places)} image tokens, but features of {held}")
        if features is not None:
            embeds[places] = features if features.ndim == 2 else features[0]
            levels[:, places] = features[1:] if features.ndim == 3 else 0
        return embeds, levels


def empty_cache(shapes: Shapes, length: int, floats: Any = np.float32) -> Cache:
    """A cache for ``length`` tokens."""
    # Zeros, not garbage: a masked position still meets a weight of 0, and 0 times NaN is NaN.
    return {
        (kind, layer): np.zeros((1, shapes.kv_heads, length, shapes.head_dim), floats)
        for layer in range(shapes.layers)
        for kind in "kv"
    }
