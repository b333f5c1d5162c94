"""TensorRT engines on one GPU: bound buffers, a KV cache updated in place, the decoding step one CUDA graph.

Three streams: the MLLM's, the segmenter's, and one for the copies of pixels and masks, so that an image is
uploaded and encoded beside the decoding steps. Built, tested without a GPU, but not executed on one.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from ppcr.errors import BundleError
from ppcr.manifest import REBUILD, EngineEntry
from runtime import tensorrt_library
from runtime.attention_plugin import OPTION, register
from runtime.bundle import AUTO, Bundle
from runtime.contexts import SlotContext
from runtime.device import DeviceMemory, PinnedArray, Stream, current_device
from runtime.positions import make_tables
from runtime.session import Float32Array, Sessions
from runtime.tensorrt_cache import DeviceFeatures, Slot
from runtime.tensorrt_engine import Engine, rebuild, require_loadable, require_memory
from runtime.tensorrt_segmenter import TensorRTSegmenter


def load(bundle: Bundle, *, threads: int, precision: str = AUTO) -> Sessions:
    """Both sessions of a bundle that holds engines for the GPU of this process.

    precision: of the engines; "auto": that of those built last.

    Raises:
        BundleError: there are no engines for it, or one of them is stale, changed or cut short.
        EngineError: no GPU, driver, TensorRT or room; an engine of another GPU or version.
    """
    device, library = current_device(), tensorrt_library.find()
    manifest, shapes = bundle.manifest, bundle.manifest.shapes
    if shapes.deepstack:
        raise BundleError(f"this engine does not feed the DeepStack inputs of this bundle's MLLM: {REBUILD}")
    if len(bundle.config.mllm.sizes) > 1:
        raise BundleError(f"this engine takes images of one size, this bundle has several: {REBUILD}")
    entries: dict[str, EngineEntry] = manifest.engine_set(
        device.target, None if precision == AUTO else precision
    )
    for entry in entries.values():
        require_loadable(entry, manifest, bundle.folder, library, device)
    cache = 4 * shapes.layers * shapes.kv_heads * shapes.max_length * shapes.head_dim
    require_memory(entries, cache, device)
    # Engines that hold the plugin find it when they are loaded.
    if any(OPTION in entry.options for entry in entries.values()):
        register(library.module)
    runtime = library.create_runtime()
    engines = {
        role: Engine(
            library, runtime, bundle.folder / entry.file, f"rebuild: {rebuild(entry, bundle.folder)}"
        )
        for role, entry in entries.items()
    }
    mllm = TensorRTMLLM(engines["vision"], engines["decoder"], bundle)
    segmenter = TensorRTSegmenter(engines["image_encoder"], engines["mask_decoder"])
    for engine in engines.values():
        engine.save_kernels()
    return Sessions(mllm, segmenter, precision=entries["decoder"].precision, device="cuda")


class TensorRTMLLM:
    """`runtime.session.MLLMSession`. Threads may share it; their blocks run one after the other."""

    def __init__(self, vision: Engine, decoder: Engine, bundle: Bundle) -> None:
        self._shapes = bundle.manifest.shapes
        self._embedding, self._image_token = bundle.embedding, bundle.tokenizer.image_token
        image_start = len(bundle.tokenizer.before_image)
        self._tables = make_tables(self._shapes.max_length, image_start, self._shapes.grid, bundle.rotary)
        self._lock = threading.Lock()
        self._stream = Stream()
        self._vision, self._decoder = vision, decoder
        self._see = vision.context(self._stream)
        self._patches = PinnedArray(vision.tensors["pixel_values"].shape, np.float32)
        self._pixels = vision.memory("pixel_values")
        self._see.bind("pixel_values", self._pixels.address)
        self._prefixes: dict[tuple[int, ...], list[DeviceMemory]] = {}
        self._free = [self._slot()]  # the first conversation finds everything bound and captured

    def encode_image(self, patches: Float32Array, *, size: tuple[int, int] | None = None) -> DeviceFeatures:
        """Patches f32 [patches, patch_dim] to features f32 [image_tokens, hidden] on the GPU."""
        with self._lock:
            features = self._vision.memory("image_features")
            self._patches.array[...] = patches
            self._stream.upload(self._pixels.address, self._patches.address, self._patches.array.nbytes)
            self._see.bind("image_features", features.address)
            self._see.run()
            ready = self._stream.record()
            self._stream.wait()
        return DeviceFeatures({"image_features": features}, ready)

    def open(
        self,
        max_length: int | None = None,
        *,
        prefix: Sequence[int] = (),
        size: tuple[int, int] | None = None,
    ) -> SlotContext[Slot]:
        """A conversation that begins with ``prefix``, computed the first time and copied from then on.

        Its cache is that of a conversation that ended, or a new one.
        """
        most = self._shapes.max_length
        if max_length is not None and not 0 < max_length <= most:
            raise ValueError(f"a context of {max_length} tokens: this bundle's cache holds 1 to {most}")
        with self._lock:
            slot = self._free.pop() if self._free else self._slot()
        context = SlotContext(self, slot)
        key = tuple(prefix)
        if not key:
            return context
        known = self._prefixes.get(key)
        if known is None:
            context.extend(prefix)
            with self._lock:
                self._prefixes = {key: slot.snapshot(len(key))}
        else:
            with self._lock:
                slot.restore(known, len(key))
            context.begin(len(key))
        return context

    def run(
        self, slot: Slot, token_ids: Sequence[int], start: int, features: DeviceFeatures | None
    ) -> Float32Array:
        """One block of a conversation; logits f32 [vocabulary] after it."""
        with self._lock:
            if len(token_ids) == 1 and features is None and token_ids[0] != self._image_token:
                slot.step(self._embedding[token_ids[0]], start)
            else:
                ids = np.asarray(token_ids, np.int64)
                places = np.flatnonzero(ids == self._image_token)
                held = 0 if features is None else self._shapes.image_tokens
                if len(places) != held:
                    raise ValueError(f"{len(places)} image tokens, but features of {held}")
                slot.block(self._embedding[ids], start, places, features)
            self._stream.wait()
        logits: Float32Array = slot.logits.array[0, 0]
        return logits

    def release(self, slot: Slot) -> None:
        """A conversation ended: the next may have its cache."""
        self._free.append(slot)

    def _slot(self) -> Slot:
        return Slot(self._decoder, self._shapes, self._tables, self._stream)
