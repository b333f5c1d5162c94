"""onnxruntime on the CPU: the sessions of a bundle; conversations are `runtime.onnxruntime_context`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from ppcr.manifest import WEIGHTS, vision_role
from runtime.bundle import Bundle
from runtime.host_context import HostDecoder
from runtime.host_mllm import HostMLLM, ImageTowers
from runtime.onnxruntime_context import OnnxContext
from runtime.onnxruntime_library import Session, floats_of, open_graph
from runtime.onnxruntime_segmenter import OnnxSegmenter
from runtime.session import Float32Array, Sessions
from runtime.threads import Threads, share_threads


def load(bundle: Bundle, *, threads: int) -> Sessions:
    """Both sessions of a bundle, using ``threads`` processors.

    Raises:
        BundleError: a graph cannot be read, or does not take what this runtime feeds.
        EngineError: this onnxruntime lacks an operator that a graph uses.
    """
    plan = plan_threads(bundle, threads)
    vision, encoder, drawer = (
        open_graph(bundle.graphs[role], getattr(plan, role))
        for role in ("vision", "image_encoder", "mask_decoder")
    )
    mllm = OnnxMLLM(Towers(vision, bundle, plan.vision), load_decoder(bundle, threads=threads), bundle)
    return Sessions(mllm, OnnxSegmenter(encoder, drawer))


def load_segmenter(bundle: Bundle, *, threads: int) -> OnnxSegmenter:
    """The segmenter alone. Raises as `load` does."""
    graphs = (open_graph(bundle.graphs[role], threads) for role in ("image_encoder", "mask_decoder"))
    return OnnxSegmenter(*graphs)


def load_decoder(bundle: Bundle, *, threads: int) -> tuple[Session, Session]:
    """The decoder for blocks and for single tokens (may be one), alone. Raises as `load` does."""
    plan, path = plan_threads(bundle, threads), bundle.graphs["decoder"]
    decoder = open_graph(path, plan.decoder)
    return decoder, decoder if plan.step == plan.decoder else open_graph(path, plan.step)


def plan_threads(bundle: Bundle, threads: int) -> Threads:
    """Who gets how many of ``threads``, by the bytes of the decoder that is read."""
    weights = [bundle.graphs[role] for role in ("decoder", f"decoder{WEIGHTS}") if role in bundle.graphs]
    return share_threads(threads, sum(path.stat().st_size for path in weights))


class Towers:
    """The vision graphs of a bundle by image size; those beyond the first are opened when they are needed."""

    def __init__(
        self,
        first: Session,
        bundle: Bundle,
        threads: int,
        providers: Sequence[Any] = ("CPUExecutionProvider",),
    ) -> None:
        self._opened = {bundle.config.mllm.image_size: first}
        self._graphs, self._threads, self._providers = bundle.graphs, threads, providers
        self._lock = threading.Lock()

    def run(
        self, size: tuple[int, int], names: Sequence[str], patches: Float32Array
    ) -> list[npt.NDArray[Any]]:
        """Outputs called ``names`` of the tower for images of ``size``, from patches f32 [n, patch_dim]."""
        with self._lock:
            if size not in self._opened:
                graph = self._graphs[vision_role(size)]
                self._opened[size] = open_graph(graph, self._threads, self._providers)
            tower = self._opened[size]
        found: list[npt.NDArray[Any]] = tower.run(
            list(names), {"pixel_values": patches.astype(floats_of(tower), copy=False)}
        )
        return found


class OnnxMLLM(HostMLLM):
    """`runtime.session.MLLMSession`. Threads may share it: onnxruntime sessions may run concurrently.

    Without ``towers`` it encodes no image: a subclass does, on another engine.
    """

    def __init__(
        self,
        towers: ImageTowers | None,
        decoders: tuple[Session, Session],
        bundle: Bundle,
    ) -> None:
        # A graph may fix the length of its cache, or leave it to the host.
        cache = next(value for value in decoders[0].get_inputs() if value.name == "k_cache_0")
        super().__init__(towers, bundle, fixed=isinstance(cache.shape[2], int))
        self._decoders = decoders

    def _new_context(self, host: HostDecoder, length: int) -> OnnxContext:
        return OnnxContext(self._decoders, host, length)
