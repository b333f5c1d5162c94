"""onnxruntime on a GPU: caches, features and the step's inputs stay there, and the step is one CUDA graph.

All else is the CPU session's. Tests run it with the CPU in the GPU's place; it was not executed on a GPU.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from ppcr.errors import BundleError, EngineError, PPCRError
from runtime.bundle import Bundle
from runtime.host_context import HostDecoder
from runtime.onnxruntime_context import OnnxContext
from runtime.onnxruntime_library import (
    Session,
    graph_options,
    on_device,
    open_graph,
    require_provider,
    reraise_memory,
)
from runtime.onnxruntime_segmenter import OnnxSegmenter, SegmenterFeatures
from runtime.onnxruntime_session import OnnxMLLM, Towers
from runtime.session import Float32Array, Prompts, Sessions

PROVIDER = "CUDAExecutionProvider"
_CPU = "CPUExecutionProvider"
_NO_GRAPH = -1
# What changes from token to token; the step's other inputs were fed when it was bound.
_CHANGING = ("inputs_embeds", "rope_cos", "rope_sin", "attn_mask", "write_indices")


def load(bundle: Bundle, *, threads: int, device: str = "cuda") -> Sessions:
    """Both sessions of a bundle on a GPU.

    device: "cuda", or "cpu" to run the same code without a GPU, as tests do.

    Raises:
        EngineError: this onnxruntime has no CUDA provider, or that cannot start, or the GPU has no room.
        BundleError: a graph cannot be read.
    """
    providers = _providers(device)
    with _clear_errors():
        decoder, graphs = _open_decoder(bundle.graphs["decoder"], threads, device)
        vision, encoder, drawer = (
            _open(bundle.graphs[role], threads, providers)
            for role in ("vision", "image_encoder", "mask_decoder")
        )
        towers = Towers(vision, bundle, threads, providers)
        mllm = BoundMLLM(towers, decoder, bundle, device, graphs=graphs)
    return Sessions(mllm, BoundSegmenter(encoder, drawer, device), device=device)


def _providers(device: str, **settings: str) -> list[Any]:
    if device == "cpu":
        return [_CPU]
    require_provider(PROVIDER)
    return [(PROVIDER, {"device_id": "0", **settings}), _CPU]


def _open(path: Path, threads: int, providers: list[Any]) -> Any:
    session = open_graph(path, threads, providers)
    # onnxruntime goes on with the CPU when CUDA's libraries or the driver do not load.
    if providers != [_CPU] and session.get_providers()[0] != PROVIDER:
        raise EngineError(
            "onnxruntime's CUDA provider does not start: it needs the CUDA and cuDNN libraries that it was "
            "built for (pip install 'onnxruntime-gpu[cuda,cudnn]') and a driver for them"
        )
    return session


def _open_decoder(path: Path, threads: int, device: str) -> tuple[Any, bool]:
    """The decoder, and whether its steps can be recorded: only if the GPU computes every operator of it."""
    if device == "cpu":
        return _open(path, threads, [_CPU]), False
    try:
        return _open(path, threads, _providers(device, enable_cuda_graph="1")), True
    except BundleError as error:
        if "graph capture" not in str(error.__cause__).lower():
            raise
    warnings.warn(
        "the decoding step runs without a CUDA graph: this onnxruntime computes a part of it on the CPU",
        RuntimeWarning,
        stacklevel=3,
    )
    return _open(path, threads, _providers(device)), False


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Running out of memory in the body is an EngineError."""
    try:
        yield
    except PPCRError:
        raise
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        reraise_memory(error)
        raise


_P = ParamSpec("_P")
_R = TypeVar("_R")


def _clearly(function: Callable[_P, _R]) -> Callable[_P, _R]:
    def called(*arguments: _P.args, **named: _P.kwargs) -> _R:
        with _clear_errors():
            return function(*arguments, **named)

    called.__doc__ = function.__doc__
    return called


class BoundMLLM(OnnxMLLM):
    """`runtime.session.MLLMSession`. Threads may share it; their blocks run one after the other."""

    def __init__(
        self, towers: Towers, decoder: Any, bundle: Bundle, device: str, *, graphs: bool = False
    ) -> None:
        super().__init__(towers, (decoder, decoder), bundle)
        self._decoder, self._device, self._graphs = decoder, device, graphs
        self._lock = threading.Lock()
        self._made = 0
        self._free: list[DeviceCache] = []
        self._read: dict[tuple[int, ...], dict[tuple[str, int], Any]] = {}

    @_clearly
    def encode_image(self, patches: Float32Array, *, size: tuple[int, int] | None = None) -> Float32Array:
        """As `OnnxMLLM.encode_image`; the features come back to the host, where blocks are put together."""
        return super().encode_image(patches, size=size)

    def open(  # type: ignore[override]  # a cache that is used again stands behind what it answers with
        self,
        max_length: int | None = None,
        *,
        prefix: Sequence[int] = (),
        size: tuple[int, int] | None = None,
    ) -> BoundContext:
        """A conversation that begins with ``prefix``, computed the first time and copied from then on.

        Its cache is that of a conversation that ended, or a new one.
        """
        self._cache_length(max_length)
        host, key = self._host_of(size or self._config.image_size), tuple(prefix)
        with self._lock, _clear_errors():
            fitting = [cache for cache in self._free if cache.host is host]
            if fitting:
                cache = fitting[-1]
                self._free.remove(cache)
                cache.truncate(0)
            else:
                graph = self._made if self._graphs else _NO_GRAPH
                cache = DeviceCache(
                    self._decoders, host, self._shapes.max_length, device=self._device, graph=graph
                )
                self._made += 1
            if key in self._read:
                cache.restore(self._read[key], len(key))
            elif key:
                cache.extend(key)
                self._read = {key: cache.snapshot()}
        return BoundContext(cache, self._lock, self._free)


class DeviceCache(OnnxContext):
    """A KV cache on a device and both ways to extend it; single tokens from inputs that lie there as well.

    graph: number of the CUDA graph that single tokens are recorded as; -1: none. It holds the addresses of
    this cache, which is therefore used again rather than made anew.
    """

    def __init__(
        self, decoders: tuple[Session, Session], host: HostDecoder, length: int, *, device: str, graph: int
    ) -> None:
        self._device, self.host = device, host
        super().__init__(decoders, host, length)
        self._recorded, self._plain = graph_options(graph), graph_options(_NO_GRAPH)

    def snapshot(self) -> dict[tuple[str, int], Any]:
        """Copies on the device of the whole cache."""
        return {place: self._value(value.numpy().copy()) for place, value in self._held.items()}

    def restore(self, snapshot: dict[tuple[str, int], Any], length: int) -> None:
        """Begin with the keys and values of ``length`` tokens of `snapshot`."""
        for place, value in self._held.items():
            value.update_inplace(snapshot[place])
        self._length = length

    def _value(self, array: npt.NDArray[Any]) -> Any:
        return on_device(array, self._device)

    def _launch_step(self) -> None:
        for name in _CHANGING:
            self._fed[name].update_inplace(self._at if name == "write_indices" else self._step[name])
        self._stepper.run_with_iobinding(self._single, self._recorded)
        self._logits[...] = self._answer.numpy()

    def _launch_block(self, binding: Any) -> None:
        # What goes to a GPU is copied when it is bound, not when it is run.
        for name, array in (("write_indices", self._at), ("logits_index", self._last)):
            binding.bind_cpu_input(name, array)
        self._decoder.run_with_iobinding(binding, self._plain)
        self._logits[...] = self._answer.numpy()


class BoundContext:
    """`runtime.session.Context` on a cache, which is free for the next when the conversation is forgotten."""

    def __init__(self, cache: DeviceCache, lock: threading.Lock, free: list[DeviceCache]) -> None:
        self._cache, self._lock, self._free = cache, lock, free

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._cache.length

    @property
    def capacity(self) -> int:
        """Tokens the cache can hold."""
        return self._cache.capacity

    def extend(self, token_ids: Sequence[int], features: Float32Array | None = None) -> Float32Array:
        """Run a block; logits f32 [vocabulary] after its last token, overwritten by the next call."""
        with self._lock, _clear_errors():
            return self._cache.extend(token_ids, features)

    def truncate(self, length: int) -> None:
        """Forget everything from position ``length`` on: the cache's rows are simply written again."""
        self._cache.truncate(length)

    def __del__(self) -> None:
        self._free.append(self._cache)


class BoundSegmenter(OnnxSegmenter):
    """`runtime.session.SegmenterSession`; an image's features stay on the device. Threads may share it."""

    most_at_once = 64
    """A GPU has work for many masks at a time; `MASK_PIXELS` bounds their memory."""

    def __init__(self, image_encoder: Any, mask_decoder: Any, device: str) -> None:
        super().__init__(image_encoder, mask_decoder)
        self._device = device

    def _encode(self, pixels: Float32Array) -> SegmenterFeatures:
        binding = self._encoder.io_binding()
        binding.bind_cpu_input("pixels", np.ascontiguousarray(pixels, np.float32))
        for name in self._encoded:
            binding.bind_output(name, self._device)
        with _clear_errors():
            self._encoder.run_with_iobinding(binding)
        return dict(zip(self._encoded, binding.get_outputs(), strict=True))

    def _decode(self, features: SegmenterFeatures, prompts: Prompts) -> tuple[Float32Array, Float32Array]:
        binding = self._decoder.io_binding()
        for name, value in features.items():
            binding.bind_ortvalue_input(name, value)
        for name, array in vars(prompts).items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in ("mask_logits", "scores"):
            binding.bind_output(name)
        with _clear_errors():
            self._decoder.run_with_iobinding(binding)
        logits, scores = (value.numpy() for value in binding.get_outputs())
        return logits, scores
