"""TensorRT engines on one GPU: bound buffers, a KV cache updated in place, the decoding step one CUDA graph.

Three streams: the MLLM's, the segmenter's, and one for the copies of pixels and masks, so that an image is
uploaded and encoded beside the decoding steps. Built, tested without a GPU, but not executed on one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from ppcr.manifest import ROLES, EngineEntry, vision_role
from runtime import tensorrt_library
from runtime.attention_plugin import OPTION, register
from runtime.bundle import AUTO, Bundle
from runtime.contexts import SlotContext
from runtime.device import DeviceMemory, Stream, current_device
from runtime.positions import Tables, make_tables
from runtime.session import Float32Array, Sessions
from runtime.tensorrt_cache import DeviceFeatures, Slot
from runtime.tensorrt_engine import Engine, rebuild, require_loadable, require_memory
from runtime.tensorrt_segmenter import TensorRTSegmenter
from runtime.tensorrt_towers import Towers


def load(bundle: Bundle, *, threads: int, precision: str = AUTO) -> Sessions:
    """Both sessions of a bundle that holds engines for the GPU of this process.

    precision: of the engines; "auto": that of those built last.

    Raises:
        BundleError: there are no engines for it, or one of them is stale, changed or cut short.
        EngineError: no GPU, driver, TensorRT or room; an engine of another GPU or version.
    """
    device, library = current_device(), tensorrt_library.find()
    manifest, shapes = bundle.manifest, bundle.manifest.shapes
    entries: dict[str, EngineEntry] = manifest.engine_set(
        device.target, None if precision == AUTO else precision
    )
    for entry in entries.values():
        require_loadable(entry, manifest, bundle.folder, library, device)
    cache = 4 * shapes.layers * shapes.kv_heads * shapes.max_length * shapes.head_dim
    # Towers for further image sizes are loaded when they are needed.
    require_memory({role: entries[role] for role in ROLES}, cache, device)
    # Engines that hold the plugin find it when they are loaded.
    if any(OPTION in entry.options for entry in entries.values()):
        register(library.module)
    runtime, opened = library.create_runtime(), list[Engine]()

    def open_engine(role: str) -> Engine:
        entry = entries[role]
        cure = f"rebuild: {rebuild(entry, bundle.folder)}"
        opened.append(Engine(library, runtime, bundle.folder / entry.file, cure))
        return opened[-1]

    def open_tower(size: tuple[int, int]) -> Engine:
        return open_engine("vision" if size == bundle.config.mllm.image_size else vision_role(size))

    mllm = TensorRTMLLM(open_tower, open_engine("decoder"), bundle)
    segmenter = TensorRTSegmenter(open_engine("image_encoder"), open_engine("mask_decoder"))
    for engine in opened:
        engine.save_kernels()
    return Sessions(mllm, segmenter, precision=entries["decoder"].precision, device="cuda")


class TensorRTMLLM:
    """`runtime.session.MLLMSession`. Threads may share it; their blocks run one after the other."""

    def __init__(self, tower: Callable[[tuple[int, int]], Engine], decoder: Engine, bundle: Bundle) -> None:
        """tower: the vision engine for an image size."""
        self._shapes, self._config = bundle.manifest.shapes, bundle.config.mllm
        self._embedding, self._image_token = bundle.embedding, bundle.tokenizer.image_token
        self._image_start, self._rotary = len(bundle.tokenizer.before_image), bundle.rotary
        self._tables: dict[tuple[int, int], Tables] = {}
        self._lock = threading.Lock()
        self._stream, self._decoder = Stream(), decoder
        self._towers = Towers(self._config.image_size, tower, self._stream)
        self._prefixes: dict[tuple[int, ...], list[DeviceMemory]] = {}
        self._free = [self._slot()]  # the first conversation finds everything bound and captured

    def encode_image(self, patches: Float32Array, *, size: tuple[int, int] | None = None) -> DeviceFeatures:
        """Patches f32 [patches, patch_dim] to features f32 [image_tokens, hidden] on the GPU."""
        with self._lock:
            return self._towers.of(size or self._config.image_size).encode(patches)

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
            slot.tables = self._tables_of(size or self._config.image_size)
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
                held = 0 if features is None else features.tokens
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
        tables = self._tables_of(self._config.image_size)
        return Slot(self._decoder, self._shapes, tables, self._stream)

    def _tables_of(self, size: tuple[int, int]) -> Tables:
        if size not in self._tables:
            grid = self._config.grid_of(size)
            made = make_tables(self._shapes.max_length, self._image_start, grid, self._rotary)
            self._tables[size] = made
        return self._tables[size]
