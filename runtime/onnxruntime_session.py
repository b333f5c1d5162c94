"""onnxruntime on the CPU: bound buffers, a KV cache updated in place, no allocation per decoding step."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ppcr.manifest import WEIGHTS, Shapes, vision_role
from ppcr.tensors import RowTable
from runtime.bundle import Bundle
from runtime.contexts import FilledContext
from runtime.onnxruntime_branches import OnnxBranches, Snapshot
from runtime.onnxruntime_library import Binding, Session, Value, floats_of, open_graph
from runtime.onnxruntime_segmenter import OnnxSegmenter
from runtime.positions import Tables, make_tables
from runtime.session import Float32Array, Sessions
from runtime.threads import Threads, share_threads

_CACHE_STEP = 64


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

    def of(self, size: tuple[int, int]) -> Session:
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
        decoders: tuple[Session, Session],
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
        context = self._new_context(tables, length)
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

    def _new_context(self, tables: Tables, length: int) -> OnnxContext:
        return OnnxContext(self._decoders, self._shapes, tables, self._embedding, self._image_token, length)

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


class OnnxContext(FilledContext):
    """`runtime.session.Context`: two sets of bindings over one KV cache, for single tokens and for blocks.

    The cache is bound as input and as output, so that it is updated in place. For single tokens every buffer
    is bound once and filled in place; for blocks the inputs that carry the block's length are bound anew, as
    views of buffers that already exist.
    """

    def __init__(
        self,
        decoders: tuple[Session, Session],
        shapes: Shapes,
        tables: Tables,
        embedding: Float32Array | RowTable,
        image_token: int,
        length: int,
    ) -> None:
        self._decoder, self._stepper = decoders
        self._embedding, self._image_token = embedding, image_token
        self._capacity, self._shapes, self._tables = length, shapes, tables
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

    def _value(self, array: npt.NDArray[Any]) -> Value:
        """``array`` for a binding: here its own memory, so that what is written into it is fed."""
        return Value.ortvalue_from_numpy(array)

    def _bind(self, session: Session) -> Binding:
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
    def capacity(self) -> int:
        """Tokens the cache can hold."""
        return self._capacity

    @cached_property
    def can_branch(self) -> bool:
        """Whether the graph answers for several tokens of a block, on a cache of any length."""
        return self.can_verify and not self._is_fixed("k_cache_0", 2)

    @cached_property
    def can_verify(self) -> bool:
        """Whether the graph answers for several tokens of a block."""
        return not self._is_fixed("logits_index", 0)

    def _is_fixed(self, name: str, axis: int) -> bool:
        return any(
            value.name == name and isinstance(value.shape[axis], int) for value in self._decoder.get_inputs()
        )

    def branch(self, count: int) -> OnnxBranches:
        """``count`` conversations that begin with what this one holds, on a cache of their own."""
        return OnnxBranches(
            (self._decoder, self._stepper), self._shapes, self._tables, self._embedding, self._image_token,
            self.snapshot(), count,
        )  # fmt: skip

    def snapshot(self) -> Snapshot:
        """Copies of the keys and values held."""
        return {place: memory[:, :, : self._length].copy() for place, memory in self._cache.items()}

    def restore(self, snapshot: Snapshot, length: int) -> None:
        """Begin with the keys and values of ``length`` tokens that another context has computed."""
        for place, memory in self._cache.items():
            memory[:, :, :length] = snapshot[place]
        self._length = length

    def extend(self, token_ids: Sequence[int], features: Float32Array | None = None) -> Float32Array:
        """Run a block; logits f32 [vocabulary] after its last token, overwritten by the next call."""
        count, start = len(token_ids), self._begin(token_ids)
        if count == 1 and features is None and token_ids[0] != self._image_token:
            self._run_single(token_ids[0], start)
        else:
            self._last[0] = count - 1
            self._run_block(np.asarray(token_ids, np.int64), start, features)
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
        self._block.bind_cpu_input("logits_index", np.arange(count - 1 - guesses, count))
        self._block.bind_ortvalue_output("logits", Value.ortvalue_from_numpy(answers))
        try:
            self._run_block(np.asarray(token_ids, np.int64), start, features)
        finally:
            self._block.bind_cpu_input("logits_index", self._last)
            self._block.bind_ortvalue_output("logits", self._answer)
        self._length = start + count
        return answers[0]

    def _begin(self, token_ids: Sequence[int]) -> int:
        """Where these tokens go. Raises ValueError when they do not fit."""
        count, start = len(token_ids), self._length
        if not 0 < count <= self._capacity - start:
            raise ValueError(f"{count} tokens do not fit after {start} of a context of {self._capacity}")
        self._at[0] = start
        return start

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
        binding = self._block
        binding.bind_cpu_input("inputs_embeds", embeds[None])
        binding.bind_cpu_input("rope_cos", self._cos[None, rows])
        binding.bind_cpu_input("rope_sin", self._sin[None, rows])
        for level, values in enumerate(levels):
            binding.bind_cpu_input(f"deepstack_{level}", values[None])
        binding.bind_cpu_input("attn_mask", self._mask[None, None, rows])
        self._launch_block()
