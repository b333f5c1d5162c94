"""TensorRT engines on one GPU: bound buffers, a KV cache updated in place, the decoding step one CUDA graph.

Three streams: the MLLM's, the segmenter's, and one for the copies of pixels and masks, so that an image is
uploaded and encoded beside the decoding steps. Built, tested without a GPU, but not executed on one.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppcr.errors import BundleError, EngineError
from ppcr.manifest import REBUILD, EngineEntry, Shapes
from runtime import tensorrt_library
from runtime.bundle import Bundle
from runtime.device import DeviceMemory, Event, Graph, PinnedArray, Stream, current_device
from runtime.positions import Tables, make_tables
from runtime.session import Float32Array, Prompts, Sessions
from runtime.tensorrt_engine import Context, Engine, rebuild, require_loadable, require_memory

FEATURES = ("image_features", "high_res_0", "high_res_1")
_PROMPTS = ("boxes", "points", "spatial_valid", "text_embeddings", "text_mask")
_STEP, _BLOCK = 0, 1  # optimization profiles of the decoder
_STEP_INPUTS = ("inputs_embeds", "rope_cos", "rope_sin", "attn_mask")


def load(bundle: Bundle, *, threads: int) -> Sessions:
    """Both sessions of a bundle that holds engines for the GPU of this process.

    Raises:
        BundleError: there are no engines for it, or one of them is stale, changed or cut short.
        EngineError: no GPU, driver, TensorRT or room; an engine of another GPU or version.
    """
    device, library = current_device(), tensorrt_library.find()
    manifest, shapes = bundle.manifest, bundle.manifest.shapes
    if shapes.deepstack:
        raise BundleError(f"this engine does not feed the DeepStack inputs of this bundle's MLLM: {REBUILD}")
    entries: dict[str, EngineEntry] = manifest.engine_set(device.target)
    for entry in entries.values():
        require_loadable(entry, manifest, bundle.folder, library, device)
    cache = 4 * shapes.layers * shapes.kv_heads * shapes.max_length * shapes.head_dim
    require_memory(entries, cache, device)
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
    return Sessions(mllm, segmenter, precision=entries["decoder"].precision)


@dataclass(frozen=True)
class DeviceFeatures:
    """Image features on the GPU by tensor name, and the mark behind which they are there."""

    memory: dict[str, DeviceMemory]
    ready: Event


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

    def encode_image(self, patches: Float32Array) -> DeviceFeatures:
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

    def open(self, max_length: int | None = None, *, prefix: Sequence[int] = ()) -> TensorRTContext:
        """A conversation that begins with ``prefix``, computed the first time and copied from then on.

        Its cache is that of a conversation that ended, or a new one.
        """
        most = self._shapes.max_length
        if max_length is not None and not 0 < max_length <= most:
            raise ValueError(f"a context of {max_length} tokens: this bundle's cache holds 1 to {most}")
        with self._lock:
            slot = self._free.pop() if self._free else self._slot()
        context = TensorRTContext(self, slot)
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


class Slot:
    """A KV cache and both ways to extend it, bound once: the step as a CUDA graph, blocks of any length."""

    def __init__(self, decoder: Engine, shapes: Shapes, tables: Tables, stream: Stream) -> None:
        self._shapes, self._tables, self._stream = shapes, tables, stream
        self.logits = PinnedArray((1, 1, shapes.vocabulary), np.float32)
        self._answer = decoder.memory("logits")
        # Zeros, not garbage: a masked position still meets a weight of 0, and 0 times NaN is NaN.
        self.caches = {
            f"{kind}_cache{{}}_{layer}": decoder.memory(f"{kind}_cache_{layer}", zeroed=True)
            for layer in range(shapes.layers)
            for kind in "kv"
        }
        self._itemsize = decoder.tensors["k_cache_0"].itemsize
        length, half = shapes.max_length, shapes.head_dim // 2
        width = {
            "inputs_embeds": (shapes.hidden, np.float32),
            "rope_cos": (half, np.float32),
            "rope_sin": (half, np.float32),
            "attn_mask": (length, np.bool_),
        }
        # One set of rows serves both ways: a step uses the first row of each.
        self._rows = {name: PinnedArray((length, size), kind) for name, (size, kind) in width.items()}
        self._numbers = {name: PinnedArray((1,), np.int64) for name in ("write_indices", "logits_index")}
        pinned = {**self._rows, **self._numbers}
        self._inputs = {name: DeviceMemory(memory.array.nbytes) for name, memory in pinned.items()}
        self._one, self._many = self._bind(decoder, _STEP), self._bind(decoder, _BLOCK)
        self._shape(self._one, 1)
        self._graph = self._capture()

    @property
    def capacity(self) -> int:
        """Tokens the cache can hold."""
        return self._shapes.max_length

    def step(self, embedding: Float32Array, start: int) -> None:
        """Queue the run of one token at position ``start``; its embedding is f32 [hidden]."""
        self._fill(embedding[None], start)
        if self._graph is not None:
            self._graph.launch(self._stream)
        else:
            self._queue_step()

    def block(
        self,
        embeddings: Float32Array,
        start: int,
        places: npt.NDArray[np.int64],
        features: DeviceFeatures | None,
    ) -> None:
        """Queue the run of a block f32 [S, hidden] from ``start``; ``features`` go to rows ``places``."""
        count = len(embeddings)
        self._fill(embeddings, start)
        self._shape(self._many, count)
        self._upload(count)
        if features is not None:
            self._stream.after(features.ready)
            row = self._rows["inputs_embeds"].array[0].nbytes
            source, target = features.memory["image_features"].address, self._inputs["inputs_embeds"].address
            # Image tokens follow each other: one copy for each run of neighbours.
            for run in np.split(np.arange(len(places)), np.flatnonzero(np.diff(places) != 1) + 1):
                self._stream.move(
                    target + int(places[run[0]]) * row, source + int(run[0]) * row, len(run) * row
                )
        self._many.run()
        self._download()

    def snapshot(self, length: int) -> list[DeviceMemory]:
        """Copies of the keys and values of the first ``length`` tokens, [kv_heads, length, head_dim] each."""
        row = self._shapes.head_dim * self._itemsize
        held = []
        for cache in self.caches.values():
            copy = DeviceMemory(self._shapes.kv_heads * length * row)
            self._copy(copy.address, length * row, cache.address, self._shapes.max_length * row, length * row)
            held.append(copy)
        self._stream.wait()
        return held

    def restore(self, snapshot: list[DeviceMemory], length: int) -> None:
        """Begin with the keys and values of ``length`` tokens of `snapshot`."""
        row = self._shapes.head_dim * self._itemsize
        for cache, copy in zip(self.caches.values(), snapshot, strict=True):
            self._copy(cache.address, self._shapes.max_length * row, copy.address, length * row, length * row)

    def _copy(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int) -> None:
        self._stream.move_rows(target, target_pitch, source, source_pitch, width, self._shapes.kv_heads)

    def _bind(self, decoder: Engine, profile: int) -> Context:
        context = decoder.context(self._stream, profile)
        for name, memory in self._inputs.items():
            context.bind(name, memory.address)
        for name, memory in self.caches.items():
            # The same address as input and output: the cache is updated in place.
            context.bind(name.format(""), memory.address)
            context.bind(name.format("_out"), memory.address)
        context.bind("logits", self._answer.address)
        return context

    def _shape(self, context: Context, count: int) -> None:
        for name, memory in self._rows.items():
            width = memory.array.shape[1]
            context.shape(name, (1, 1, count, width) if name == "attn_mask" else (1, count, width))

    def _fill(self, embeddings: Float32Array, start: int) -> None:
        count, tables = len(embeddings), self._tables
        rows = slice(start, start + count)
        values = (embeddings, tables.cos[rows], tables.sin[rows], tables.mask[rows])
        for name, value in zip(_STEP_INPUTS, values, strict=True):
            self._rows[name].array[:count] = value
        self._numbers["write_indices"].array[0] = start
        self._numbers["logits_index"].array[0] = count - 1

    def _upload(self, count: int) -> None:
        for name, memory in self._rows.items():
            self._stream.upload(self._inputs[name].address, memory.address, memory.array[:count].nbytes)
        for name, memory in self._numbers.items():
            self._stream.upload(self._inputs[name].address, memory.address, memory.array.nbytes)

    def _download(self) -> None:
        self._stream.download(self.logits.address, self._answer.address, self.logits.array.nbytes)

    def _queue_step(self) -> None:
        self._upload(1)
        self._one.run()
        self._download()

    def _capture(self) -> Graph | None:
        # The first run prepares what a capture may not: TensorRT finishes kernels and takes memory then. It
        # writes position 0, which every conversation writes again.
        self._fill(np.zeros((1, self._shapes.hidden), np.float32), 0)
        self._queue_step()
        self._stream.wait()
        try:
            return self._stream.capture(self._queue_step)
        except EngineError as error:
            warnings.warn(
                f"the decoding step runs without a CUDA graph: {error}", RuntimeWarning, stacklevel=2
            )
            return None


class TensorRTContext:
    """`runtime.session.Context` on a slot, which goes back when the conversation is forgotten."""

    def __init__(self, session: TensorRTMLLM, slot: Slot) -> None:
        self._session, self._slot, self._length = session, slot, 0

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    @property
    def capacity(self) -> int:
        """Tokens the cache can hold."""
        return self._slot.capacity

    def begin(self, length: int) -> None:
        """The slot's cache holds ``length`` tokens already."""
        self._length = length

    def extend(self, token_ids: Sequence[int], features: DeviceFeatures | None = None) -> Float32Array:
        """Run a block; logits f32 [vocabulary] after its last token, overwritten by the next call."""
        count, start = len(token_ids), self._length
        if not 0 < count <= self.capacity - start:
            raise ValueError(f"{count} tokens do not fit after {start} of a context of {self.capacity}")
        logits = self._session.run(self._slot, token_ids, start, features)
        self._length = start + count
        return logits

    def truncate(self, length: int) -> None:
        """Forget everything from position ``length`` on: the cache's rows are simply written again."""
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate a context of {self._length} tokens to {length}")
        self._length = length

    def __del__(self) -> None:
        self._session.release(self._slot)


class TensorRTSegmenter:
    """`runtime.session.SegmenterSession`. Threads may share it; they take turns."""

    def __init__(self, image_encoder: Engine, mask_decoder: Engine) -> None:
        self._encoder, self._decoder = image_encoder, mask_decoder
        self._lock = threading.Lock()
        self._stream, self._copies = Stream(), Stream()
        self._see, self._draw = image_encoder.context(self._stream), mask_decoder.context(self._stream)
        self._pinned = PinnedArray(image_encoder.tensors["pixels"].shape, np.float32)
        self._pixels = image_encoder.memory("pixels")
        self._see.bind("pixels", self._pixels.address)
        kinds = {"text_mask": np.bool_}
        most = {name: mask_decoder.most(name) for name in _PROMPTS}
        self.most_prompts = most["boxes"][0]
        self._given = {name: PinnedArray(shape, kinds.get(name, np.float32)) for name, shape in most.items()}
        self._inputs = {name: mask_decoder.memory(name, shape) for name, shape in most.items()}
        side = mask_decoder.tensors["mask_logits"].shape[1:]
        self._masks = PinnedArray((self.most_prompts, *side), np.float32)
        self._scores = PinnedArray((self.most_prompts,), np.float32)
        results = {"mask_logits": self._masks, "scores": self._scores}
        self._outputs = {name: mask_decoder.memory(name, r.array.shape) for name, r in results.items()}
        for name, memory in {**self._inputs, **self._outputs}.items():
            self._draw.bind(name, memory.address)

    def encode(self, pixels: Float32Array) -> DeviceFeatures:
        """Pixels f32 [3, H, W] to the features of one image on the GPU."""
        with self._lock:
            memory = {name: self._encoder.memory(name) for name in FEATURES}
            self._pinned.array[0] = pixels
            self._copies.upload(self._pixels.address, self._pinned.address, self._pinned.array.nbytes)
            self._stream.after(self._copies.record())
            for name, held in memory.items():
                self._see.bind(name, held.address)
            self._see.run()
            ready = self._stream.record()
            self._stream.wait()
        return DeviceFeatures(memory, ready)

    def decode(self, features: DeviceFeatures, prompts: Prompts) -> tuple[Float32Array, Float32Array]:
        """Mask logits f32 [N, h, w] and scores f32 [N]; more prompts than an engine takes go in turns."""
        parts = []
        for first in range(0, len(prompts.boxes), self.most_prompts):
            rows = slice(first, first + self.most_prompts)
            with self._lock:
                parts.append(
                    self._decode(features, {name: getattr(prompts, name)[rows] for name in _PROMPTS})
                )
        logits, scores = zip(*parts, strict=True)
        return np.concatenate(logits), np.concatenate(scores)

    def _decode(
        self, features: DeviceFeatures, given: dict[str, npt.NDArray[np.generic]]
    ) -> tuple[Float32Array, Float32Array]:
        count = len(given["boxes"])
        for name, value in given.items():
            # Dense at the front: a tensor's rows follow each other without gaps, whatever its longest shape.
            dense = self._given[name].array.reshape(-1)[: value.size]
            dense[...] = np.ravel(value)
            self._copies.upload(self._inputs[name].address, self._given[name].address, dense.nbytes)
            self._draw.shape(name, value.shape)
        self._stream.after(self._copies.record())
        self._stream.after(features.ready)
        for name, memory in features.memory.items():
            self._draw.bind(name, memory.address)
        self._draw.run()
        self._copies.after(self._stream.record())
        masks, scores = self._masks.array[:count], self._scores.array[:count]
        self._copies.download(self._masks.address, self._outputs["mask_logits"].address, masks.nbytes)
        self._copies.download(self._scores.address, self._outputs["scores"].address, scores.nbytes)
        self._copies.wait()
        return masks.copy(), scores.copy()
