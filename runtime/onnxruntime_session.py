"""onnxruntime on the CPU: bound buffers, a KV cache updated in place, no allocation per decoding step."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ppcr.errors import BundleError, EngineError
from ppcr.manifest import REBUILD, WEIGHTS, Shapes, vision_role
from ppcr.tensors import RowTable
from runtime.bundle import Bundle
from runtime.positions import Tables, make_tables
from runtime.session import Float32Array, Prompts, Sessions
from runtime.threads import Threads, share_threads

# Features of one image stay in onnxruntime's own memory between encoder and decoder.
SegmenterFeatures = dict[str, "ort.OrtValue"]
# Keys and values of the tokens held, f32 [1, kv_heads, length, head_dim], by ("k" or "v", layer).
Snapshot = dict[tuple[str, int], npt.NDArray[Any]]
_CACHE_STEP = 64
MASK_PIXELS = 1 << 20
"""Pixels of mask logits drawn at once: 16 masks of SAM's, 64 of ppcr-tiny's."""


def load(bundle: Bundle, *, threads: int) -> Sessions:
    """Both sessions of a bundle, using ``threads`` processors.

    Raises:
        BundleError: a graph cannot be read, or does not take what this runtime feeds.
        EngineError: this onnxruntime lacks an operator that a graph uses.
    """
    plan = _plan(bundle, threads)
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


def load_decoder(bundle: Bundle, *, threads: int) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    """The decoder for blocks and for single tokens (may be one), alone. Raises as `load` does."""
    plan, path = _plan(bundle, threads), bundle.graphs["decoder"]
    decoder = open_graph(path, plan.decoder)
    return decoder, decoder if plan.step == plan.decoder else open_graph(path, plan.step)


def _plan(bundle: Bundle, threads: int) -> Threads:
    weights = [bundle.graphs[role] for role in ("decoder", f"decoder{WEIGHTS}") if role in bundle.graphs]
    return share_threads(threads, sum(path.stat().st_size for path in weights))


def open_graph(
    path: Path, threads: int, providers: Sequence[Any] = ("CPUExecutionProvider",)
) -> ort.InferenceSession:
    """A graph with ``threads`` threads, as every part of a bundle is opened; by default on the CPU.

    Raises:
        BundleError: it cannot be read. EngineError: this onnxruntime lacks an operator of it, or the device
            has no room for it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    # Threads that sleep between a graph's operators cost more than a second one saves. Between runs they must
    # not spin: encoder and MLLM run side by side, and each would take the other's processor.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if type(error).__name__ == "NotImplemented":
            told = f"onnxruntime {ort.__version__} cannot run {path}: {reason}"
            raise EngineError(f"{told}; upgrade onnxruntime") from error
        reraise_memory(error)
        raise BundleError(f"onnxruntime cannot read {path}: {reason}; {REBUILD}") from error


def reraise_memory(error: Exception) -> None:
    """Raise EngineError, with the size asked for, where ``error`` says that a device has no room left."""
    told = str(error)
    asked = re.search(r"requested buffer of size (\d+)", told)
    if asked is None and "out of memory" not in told.lower():
        return
    size = f" ({int(asked[1]) / 1e6:.1f} MB more were asked for)" if asked else ""
    cure = "close other programs, or use a smaller precision (--precision int8)"
    raise EngineError(f"out of memory{size}: {cure}") from error


def write_out_functions(path: Path, folder: Path) -> Path:
    """A copy of a graph in ``folder`` with the bodies of its functions in the place of their nodes."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / path.name)
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BundleError(f"onnxruntime cannot read {path}: {reason}; {REBUILD}") from error
    return folder / path.name


class Towers:
    """The vision graphs of a bundle by image size; those beyond the first are opened when they are needed."""

    def __init__(
        self,
        first: ort.InferenceSession,
        bundle: Bundle,
        threads: int,
        providers: Sequence[Any] = ("CPUExecutionProvider",),
    ) -> None:
        self._opened = {bundle.config.mllm.image_size: first}
        self._graphs, self._threads, self._providers = bundle.graphs, threads, providers
        self._lock = threading.Lock()

    def of(self, size: tuple[int, int]) -> ort.InferenceSession:
        with self._lock:
            if size not in self._opened:
                graph = self._graphs[vision_role(size)]
                self._opened[size] = open_graph(graph, self._threads, self._providers)
            return self._opened[size]


class OnnxMLLM:
    """`runtime.session.MLLMSession`. Threads may share it: onnxruntime sessions may run concurrently.

    Without ``towers`` it encodes no image: a subclass does, on another engine.
    """

    def __init__(
        self,
        towers: Towers | None,
        decoders: tuple[ort.InferenceSession, ort.InferenceSession],
        bundle: Bundle,
    ) -> None:
        shapes, self._config = bundle.manifest.shapes, bundle.config.mllm
        self._towers, self._decoders = towers, decoders
        self._shapes = shapes
        self._embedding = bundle.embedding
        self._image_token = bundle.tokenizer.image_token
        self._prefixes: dict[tuple[int, ...], Snapshot] = {}
        # A graph may fix the length of its cache, or leave it to the host.
        cache = next(value for value in decoders[0].get_inputs() if value.name == "k_cache_0")
        self._static = isinstance(cache.shape[2], int)
        self._image_start, self._rotary = len(bundle.tokenizer.before_image), bundle.rotary
        self._tables: dict[tuple[int, int], Tables] = {}

    def encode_image(self, patches: Float32Array, *, size: tuple[int, int] | None = None) -> Float32Array:
        """Patches f32 [patches, patch_dim] to features f32 [image_tokens, hidden].

        With DeepStack [1 + levels, image_tokens, hidden]: what is added after the first layers follows.
        """
        assert self._towers is not None
        tower = self._towers.of(size or self._config.image_size)
        levels = [f"deepstack_{level}" for level in range(self._shapes.deepstack)]
        found = tower.run(
            ["image_features", *levels], {"pixel_values": patches.astype(floats_of(tower), copy=False)}
        )
        features = np.asarray(np.stack(found) if levels else found[0], np.float32)
        return features

    def open(
        self,
        max_length: int | None = None,
        *,
        prefix: Sequence[int] = (),
        size: tuple[int, int] | None = None,
    ) -> OnnxContext:
        """A conversation that begins with ``prefix``, computed the first time and copied from then on."""
        length, tables = self._cache_length(max_length), self._tables_of(size or self._config.image_size)
        context = OnnxContext(
            self._decoders, self._shapes, tables, self._embedding, self._image_token, length
        )
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

    def _tables_of(self, size: tuple[int, int]) -> Tables:
        if size not in self._tables:
            grid = self._config.grid_of(size)
            tables = make_tables(self._shapes.max_length, self._image_start, grid, self._rotary)
            self._tables = {**self._tables, size: tables}
        return self._tables[size]

    def _cache_length(self, wanted: int | None) -> int:
        most = self._shapes.max_length
        if wanted is not None and not 0 < wanted <= most:
            raise ValueError(f"a context of {wanted} tokens: this bundle's cache holds 1 to {most}")
        if wanted is None or self._static:
            return most
        # Attention looks at the whole cache: a short one is faster. Steps keep the shapes few.
        return min(most, -(-wanted // _CACHE_STEP) * _CACHE_STEP)


class OnnxContext:
    """`runtime.session.Context`: two sets of bindings over one KV cache, for single tokens and for blocks.

    The cache is bound as input and as output, so that it is updated in place. For single tokens every buffer
    is bound once and filled in place; for blocks the inputs that carry the block's length are bound anew, as
    views of buffers that already exist.
    """

    def __init__(
        self,
        decoders: tuple[ort.InferenceSession, ort.InferenceSession],
        shapes: Shapes,
        tables: Tables,
        embedding: Float32Array | RowTable,
        image_token: int,
        length: int,
    ) -> None:
        self._decoder, self._stepper = decoders
        self._embedding, self._image_token = embedding, image_token
        self._capacity, self._length = length, 0
        half = shapes.head_dim // 2
        self._logits = np.zeros((1, 1, shapes.vocabulary), np.float32)
        self._at, self._last = np.zeros(1, np.int64), np.zeros(1, np.int64)
        floats = floats_of(self._decoder)
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
        # Zeros, not garbage: a masked position still meets a weight of 0, and 0 times NaN is NaN.
        self._cache = {
            (kind, layer): np.zeros((1, shapes.kv_heads, length, shapes.head_dim), floats)
            for layer in range(shapes.layers)
            for kind in "kv"
        }
        self._held = {place: self._value(memory) for place, memory in self._cache.items()}
        self._answer = self._value(self._logits)
        self._single, self._block = self._bind(self._stepper), self._bind(self._decoder)
        self._fed = {name: self._value(buffer) for name, buffer in self._step.items()}
        self._fed["write_indices"] = self._value(self._at)
        for name, value in self._fed.items():
            self._single.bind_ortvalue_input(name, value)
        self._block.bind_cpu_input("write_indices", self._at)
        self._block.bind_cpu_input("logits_index", self._last)

    def _value(self, array: npt.NDArray[Any]) -> ort.OrtValue:
        """``array`` for a binding: here its own memory, so that what is written into it is fed."""
        return ort.OrtValue.ortvalue_from_numpy(array)

    def _bind(self, session: ort.InferenceSession) -> ort.IOBinding:
        binding = session.io_binding()
        for (kind, layer), value in self._held.items():
            binding.bind_ortvalue_input(f"{kind}_cache_{layer}", value)
            binding.bind_ortvalue_output(f"{kind}_cache_out_{layer}", value)
        binding.bind_ortvalue_output("logits", self._answer)
        return binding

    def _launch_step(self) -> None:
        self._stepper.run_with_iobinding(self._single)

    def _launch_block(self) -> None:
        self._decoder.run_with_iobinding(self._block)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    @property
    def capacity(self) -> int:
        """Tokens the cache can hold."""
        return self._capacity

    def snapshot(self) -> Snapshot:
        """Copies of the keys and values held."""
        return {place: memory[:, :, : self._length].copy() for place, memory in self._cache.items()}

    def restore(self, snapshot: Snapshot, length: int) -> None:
        """Begin with the keys and values of ``length`` tokens that another context has computed."""
        for place, memory in self._cache.items():
            memory[:, :, :length] = snapshot[place]
        self._length = length

    def truncate(self, length: int) -> None:
        """Forget everything from position ``length`` on: the cache's rows are simply written again."""
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate a context of {self._length} tokens to {length}")
        self._length = length

    def extend(self, token_ids: Sequence[int], features: Float32Array | None = None) -> Float32Array:
        """Run a block; logits f32 [vocabulary] after its last token, overwritten by the next call."""
        count, start = len(token_ids), self._length
        if not 0 < count <= self._capacity - start:
            raise ValueError(f"{count} tokens do not fit after {start} of a context of {self._capacity}")
        self._at[0] = start
        if count == 1 and features is None and token_ids[0] != self._image_token:
            self._run_single(token_ids[0], start)
        else:
            self._run_block(np.asarray(token_ids, np.int64), start, features)
        self._length = start + count
        return self._logits[0, 0]

    def _run_single(self, token: int, start: int) -> None:
        step = self._step
        step["inputs_embeds"][0, 0] = self._embedding[token]
        step["rope_cos"][0, 0] = self._cos[start]
        step["rope_sin"][0, 0] = self._sin[start]
        step["attn_mask"][0, 0, 0] = self._mask[start]
        self._launch_step()

    def _run_block(self, ids: npt.NDArray[np.int64], start: int, features: Float32Array | None) -> None:
        count, rows = len(ids), slice(start, start + len(ids))
        embeds, levels = self._embeds[:count], self._levels[:, :count]
        embeds[:] = self._embedding[ids]
        levels[:] = 0
        places = np.flatnonzero(ids == self._image_token)
        held = 0 if features is None else features.shape[-2]
        if len(places) != held:
            raise ValueError(f"{len(places)} image tokens, but features of {held}")
        if features is not None:
            embeds[places] = features if features.ndim == 2 else features[0]
            levels[:, places] = features[1:] if features.ndim == 3 else 0
        self._last[0] = count - 1
        binding = self._block
        binding.bind_cpu_input("inputs_embeds", embeds[None])
        binding.bind_cpu_input("rope_cos", self._cos[None, rows])
        binding.bind_cpu_input("rope_sin", self._sin[None, rows])
        for level, values in enumerate(levels):
            binding.bind_cpu_input(f"deepstack_{level}", values[None])
        binding.bind_cpu_input("attn_mask", self._mask[None, None, rows])
        self._launch_block()


def floats_of(session: ort.InferenceSession) -> Any:
    """numpy's type of the graph's floating inputs."""
    return np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32


def on_device(array: npt.NDArray[Any], device: str) -> ort.OrtValue:
    """``array`` in memory of ``device`` ("cuda", "cpu"); on the CPU its own."""
    return ort.OrtValue.ortvalue_from_numpy(array, device, 0)


def graph_options(graph: int) -> ort.RunOptions:
    """Options of a run that is recorded as the CUDA graph of this number, then replayed; -1: of none."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def require_provider(name: str) -> None:
    """Raise EngineError unless this onnxruntime has the provider; load libraries from installed wheels."""
    if name not in ort.get_available_providers():
        told = f"onnxruntime {ort.__version__} has no {name}"
        raise EngineError(f"{told}: install onnxruntime-gpu in the place of onnxruntime")
    with suppress(Exception):  # the libraries may lie elsewhere: the session tells
        ort.preload_dlls()


class OnnxSegmenter:
    """`runtime.session.SegmenterSession`. Threads may share it."""

    def __init__(self, image_encoder: ort.InferenceSession, mask_decoder: ort.InferenceSession) -> None:
        self._encoder, self._decoder = image_encoder, mask_decoder
        # Families differ in what they keep of an image: SAM 2 and ppcr-tiny add finer features.
        self._encoded = [output.name for output in image_encoder.get_outputs()]
        # Upscaled cells of one mask take megabytes: many masks are drawn a part at a time.
        height, width = (side for side in mask_decoder.get_outputs()[0].shape[1:])
        self._most = max(1, MASK_PIXELS // (height * width))
        wanted = {value.name for value in mask_decoder.get_inputs()}
        if not set(self._encoded) <= wanted:
            raise BundleError(f"the mask decoder does not take what the image encoder gives: {REBUILD}")

    def encode(self, pixels: Float32Array) -> SegmenterFeatures:
        """Pixels f32 [3, H, W] to the features of one image, by output name."""
        return self._encode(pixels[None])

    def encode_batch(self, pixels: Float32Array) -> list[SegmenterFeatures]:
        """Pixels f32 [B, 3, H, W] to the features of each image, computed as one batch."""
        together = {name: value.numpy() for name, value in self._encode(pixels).items()}
        return [
            {name: ort.OrtValue.ortvalue_from_numpy(value[i : i + 1]) for name, value in together.items()}
            for i in range(len(pixels))
        ]

    def _encode(self, pixels: Float32Array) -> SegmenterFeatures:
        value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(pixels, np.float32))
        outputs = self._encoder.run_with_ort_values(self._encoded, {"pixels": value})
        return dict(zip(self._encoded, outputs, strict=True))

    def decode(self, features: SegmenterFeatures, prompts: Prompts) -> tuple[Float32Array, Float32Array]:
        """Mask logits f32 [N, h, w] and scores f32 [N]."""
        count = len(prompts.boxes)
        if count <= self._most:
            return self._decode(features, prompts)
        parts = []
        for first in range(0, count, self._most):
            some = (part[first : first + self._most] for part in vars(prompts).values())
            parts.append(self._decode(features, Prompts(*some)))
        logits, scores = zip(*parts, strict=True)
        return np.concatenate(logits), np.concatenate(scores)

    def _decode(self, features: SegmenterFeatures, prompts: Prompts) -> tuple[Float32Array, Float32Array]:
        given = {
            "boxes": prompts.boxes,
            "points": prompts.points,
            "spatial_valid": prompts.spatial_valid,
            "text_embeddings": prompts.text_embeddings,
            "text_mask": prompts.text_mask,
        }
        feed = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for name, a in given.items()}
        logits, scores = self._decoder.run_with_ort_values(["mask_logits", "scores"], {**features, **feed})
        return logits.numpy(), scores.numpy()
