"""The MLLM of a bundle where conversations lie in the host's memory: what engines of CPUs share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.bundle import Bundle
from runtime.host_context import Cache, HostContext, HostDecoder
from runtime.positions import make_tables
from runtime.session import Float32Array

_CACHE_STEP = 64


class ImageTowers(Protocol):
    """The vision towers of an MLLM, one for each size of image. Threads may share them."""

    def run(
        self, size: tuple[int, int], names: Sequence[str], patches: Float32Array
    ) -> list[npt.NDArray[Any]]:
        """Outputs called ``names`` of the tower for images of ``size``, from patches f32 [n, patch_dim]."""
        ...


class HostMLLM:
    """`runtime.session.MLLMSession`, but for what is the engine's own: it fills in `_new_context`.

    Args:
        towers: None: it encodes no image.
        fixed: the decoder's graph fixes the length of its cache.
    """

    def __init__(self, towers: ImageTowers | None, bundle: Bundle, *, fixed: bool = False) -> None:
        self._towers, self._fixed = towers, fixed
        self._shapes, self._config = bundle.manifest.shapes, bundle.config.mllm
        self._embedding, self._rotary = bundle.embedding, bundle.rotary
        self._image_token = bundle.tokenizer.image_token
        self._image_start = len(bundle.tokenizer.before_image)
        self._prefixes: dict[tuple[int, ...], Cache] = {}
        self._hosts: dict[tuple[int, int], HostDecoder] = {}

    def encode_image(self, patches: Float32Array, *, size: tuple[int, int] | None = None) -> Float32Array:
        """Patches f32 [patches, patch_dim] to features f32 [image_tokens, hidden].

        With DeepStack [1 + levels, image_tokens, hidden]: what is added after the first layers follows.
        """
        assert self._towers is not None
        levels = [f"deepstack_{level}" for level in range(self._shapes.deepstack)]
        names = ["image_features", *levels]
        found = self._towers.run(size or self._config.image_size, names, patches)
        return np.asarray(np.stack(found) if levels else found[0], np.float32)

    def _new_context(self, host: HostDecoder, length: int) -> HostContext:
        raise NotImplementedError

    def open(
        self,
        max_length: int | None = None,
        *,
        prefix: Sequence[int] = (),
        size: tuple[int, int] | None = None,
    ) -> HostContext:
        """A conversation that begins with ``prefix``, computed the first time and copied from then on."""
        length, host = self._cache_length(max_length), self._host_of(size or self._config.image_size)
        context = self._new_context(host, length)
        key = tuple(prefix)
        if not key:
            return context
        # Two threads that both find it missing compute the same; the later one replaces the earlier.
        known = self._prefixes.get(key)
        if known is None:
            context.extend(prefix)
            self._prefixes = {key: context.snapshot()}
        else:
            context.restore(known, len(key))
        return context

    def _host_of(self, size: tuple[int, int]) -> HostDecoder:
        """For images of ``size``, always the same one."""
        if size not in self._hosts:
            grid = self._config.grid_of(size)
            tables = make_tables(self._shapes.max_length, self._image_start, grid, self._rotary)
            host = HostDecoder(self._shapes, tables, self._embedding, self._image_token)
            self._hosts.setdefault(size, host)
        return self._hosts[size]

    def _cache_length(self, wanted: int | None) -> int:
        most = self._shapes.max_length
        if wanted is not None and not 0 < wanted <= most:
            raise ValueError(f"a context of {wanted} tokens: this bundle's cache holds 1 to {most}")
        if wanted is None or self._fixed:
            return most
        # Attention looks at the whole cache: a short one is faster. Steps keep the shapes few.
        return min(most, -(-wanted // _CACHE_STEP) * _CACHE_STEP)

    def _after(self, length: int) -> int:
        """Tokens of the next larger cache."""
        return self._cache_length(min(length + 1, self._shapes.max_length))
