"""The text decoder of a Qwen2.5-VL or Qwen3-VL as one standard ONNX opset-24 graph; its KV cache is in place.

Inputs: ``inputs_embeds`` f[1, S, hidden]; ``rope_cos``, ``rope_sin`` f[1, S, head_dim / 2];
``write_indices`` int64[1], the cache position of the first token; ``attn_mask`` bool[1, 1, S, L], True where
a token may look; ``logits_index`` int64[W], the tokens of the block whose logits are wanted; Qwen3-VL's
``deepstack_i`` f[1, S, hidden], what is added to the hidden states after layer i (0 but for image tokens);
``k_cache_i``, ``v_cache_i`` f[1, kv_heads, L, head_dim].
Outputs: ``logits`` f32[1, W, vocabulary]; ``k_cache_out_i``, ``v_cache_out_i``, which may share memory with
the inputs. Positions and masks are the host's: the graph knows nothing of images or turns. The cache's length
L is the host's choice as well, fixed for a conversation: attention looks at all of it, so a short one is
faster. Of the last layer only the wanted tokens are computed; the others leave no more than keys and values.

Conversations that go on side by side from one image need no batch dimension: their tokens stand in one block
and one cache, where the mask keeps them apart (`runtime.branches`), and W of them are answered at once. So
the image's keys and values are held once. A graph whose cache length is fixed answers one token, W = 1.

Weights stream from the checkpoint's files into the graph's: no more than a piece of one matrix is in memory.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.external import ExternalData
from export.graph import BOOL, FLOAT, INT64, GraphWriter
from ppcr.errors import CheckpointError
from ppcr.manifest import DATA
from ppcr.tensors import Matrix, TensorFiles

OPSET = 24
FAMILIES = ("qwen2_5_vl", "qwen3_vl")
_PREFIXES = ("model.language_model.", "model.")
# Logits decide between near ties: the head is never held in fewer bits.
_HEAD_BITS = 8


@dataclass(frozen=True)
class DecoderSizes:
    """What the graph's shapes follow from; read from a Hugging Face config.json by `from_config`."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    epsilon: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    mrope_interleaved: bool
    deepstack: int
    tied: bool

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DecoderSizes:
        """From mllm/config.json, as written by transformers 4.x (Qwen2.5-VL: flat) or 5.x (``text_config``).

        Raises:
            CheckpointError: another architecture, a field is missing, or an option that the graph lacks.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            known = " and ".join(FAMILIES)
            raise CheckpointError(f"the decoder export knows {known}, not {family!r}: use a model of these")
        text = config.get("text_config") or config
        try:
            rope = text.get("rope_parameters") or text["rope_scaling"]
            heads, layers = int(text["num_attention_heads"]), int(text["num_hidden_layers"])
            _require_plain(text, rope)
            vision = config.get("vision_config") or {}
            levels = vision["deepstack_visual_indexes"] if family == "qwen3_vl" else ()
            return cls(
                family=family,
                hidden=int(text["hidden_size"]),
                intermediate=int(text["intermediate_size"]),
                layers=layers,
                heads=heads,
                kv_heads=int(text.get("num_key_value_heads") or heads),
                head_dim=int(text.get("head_dim") or text["hidden_size"] // heads),
                vocabulary=int(text["vocab_size"]),
                epsilon=float(text["rms_norm_eps"]),
                rope_theta=float(rope.get("rope_theta") or text["rope_theta"]),
                mrope_section=tuple(int(n) for n in rope["mrope_section"]),
                mrope_interleaved=family == "qwen3_vl",
                deepstack=min(len(levels), layers),
                tied=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"mllm/config.json does not describe a decoder: {error!r}") from None


def _require_plain(text: dict[str, Any], rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type") or rope.get("type", "default")
    told = {
        f"rotary positions of type {kind!r}": kind not in ("default", "mrope"),
        "sliding-window attention": bool(text.get("use_sliding_window")),
        f"the activation {text.get('hidden_act')!r}": text.get("hidden_act", "silu") != "silu",
    }
    for what, wrong in told.items():
        if wrong:
            raise CheckpointError(
                f"mllm/config.json asks for {what}, which the decoder export does not write"
            )


class DecoderWriter:
    """Writes one decoder layer by layer.

    Args:
        sizes: shapes.
        tensors: the checkpoint's tensors by name.
        max_length: length of the KV cache in tokens; None leaves it to the host.
        dtype: float32, or float16 and ml_dtypes.bfloat16 for engines that compute in them.
        bits: 8 or 4 to hold matrices as whole numbers in blocks (`export.matrices`).
        data: where the weights go; None: into the model.
    """

    def __init__(
        self,
        sizes: DecoderSizes,
        tensors: TensorFiles,
        *,
        max_length: int | None = None,
        dtype: Any = np.float32,
        bits: int | None = None,
        data: ExternalData | None = None,
    ) -> None:
        self.sizes, self.tensors = sizes, tensors
        self.length: int | str = "L" if max_length is None else max_length
        self.answers: int | str = "W" if max_length is None else 1
        self.graph = GraphWriter(opset=OPSET, dtype=dtype, bits=bits, data=data)

    def write(self, path: Path) -> None:
        """Save the decoder's graph."""
        s, g = self.sizes, self.graph
        self._declare_inputs()
        g.output("logits", [1, self.answers, s.vocabulary], FLOAT)
        x = "inputs_embeds"
        for layer in range(s.layers):
            x = self._layer(x, layer)
            if layer < s.deepstack:
                added = f"deepstack_{layer}"
                x = g.node("Add", [x, self._wanted(added, axis=1) if layer == s.layers - 1 else added])
        x = g.rms_norm(x, "norm", self._vector("norm.weight", s.hidden), s.epsilon)
        bits = None if g.bits is None else max(g.bits, _HEAD_BITS)
        g.node("Cast", [g.linear(x, "lm_head", self._head(), bits=bits)], "logits", to=FLOAT)
        g.save("decoder", path)

    def _declare_inputs(self) -> None:
        s, g = self.sizes, self.graph
        g.input("inputs_embeds", [1, "S", s.hidden])
        g.input("rope_cos", [1, "S", s.head_dim // 2])
        g.input("rope_sin", [1, "S", s.head_dim // 2])
        g.input("write_indices", [1], INT64)
        g.input("attn_mask", [1, 1, "S", self.length], BOOL)
        g.input("logits_index", [self.answers], INT64)
        for i in range(s.deepstack):
            g.input(f"deepstack_{i}", [1, "S", s.hidden])
        for i in range(s.layers):
            for cache in "kv":
                g.input(f"{cache}_cache_{i}", [1, s.kv_heads, self.length, s.head_dim])

    def _layer(self, x: str, layer: int) -> str:
        s, g, name = self.sizes, self.graph, f"layers.{layer}"
        y = self._norm(x, f"{name}.norm_1", f"{name}.input_layernorm.weight")
        if layer == s.layers - 1:
            x = self._wanted(x, axis=1)
        x = g.node("Add", [x, self._attention(y, layer)])
        y = self._norm(x, f"{name}.norm_2", f"{name}.post_attention_layernorm.weight")
        gate_up = self._matrix(
            s.hidden, {f"{name}.mlp.{part}_proj": s.intermediate for part in ("gate", "up")}
        )
        down = self._matrix(s.intermediate, {f"{name}.mlp.down_proj": s.hidden})
        return g.node("Add", [x, g.gated_mlp(y, f"{name}.mlp", gate_up, down)], f"{name}.out")

    def _attention(self, x: str, layer: int) -> str:
        s, g, name = self.sizes, self.graph, f"layers.{layer}.self_attn"
        mask = "attn_mask"
        if layer == s.layers - 1:
            k, v = g.nodes("Split", [self._heads(x, layer, "kv"), self._parts("kv")], 2, axis=1)
            k = g.node("RotaryEmbedding", [self._head_norm(k, layer, "k"), "rope_cos", "rope_sin"])
            rope = (self._wanted(table, axis=1) for table in ("rope_cos", "rope_sin"))
            q = self._head_norm(self._heads(self._wanted(x, axis=1), layer, "q"), layer, "q")
            q = g.node("RotaryEmbedding", [q, *rope])
            mask = self._wanted(mask, axis=2)
        else:
            # One product for queries, keys and values; queries and keys are turned together.
            both = g.constant("qk_v", [s.heads + s.kv_heads, s.kv_heads])
            qk, v = g.nodes("Split", [self._heads(x, layer, "qkv"), both], 2, axis=1)
            qk = g.node("RotaryEmbedding", [self._head_norm(qk, layer, "qk"), "rope_cos", "rope_sin"])
            q, k = g.nodes("Split", [qk, self._parts("qk")], 2, axis=1)
        k, v = (self._store(cache, layer, value) for cache, value in (("k", k), ("v", v)))
        y = g.node("Attention", [q, k, v, mask], is_causal=0)
        y = g.node("Transpose", [y], perm=[0, 2, 1, 3])
        y = g.node("Reshape", [y, g.constant("shape_hidden", [0, 0, s.heads * s.head_dim])])
        weight = self._matrix(s.heads * s.head_dim, {f"{name}.o_proj": s.hidden})
        return g.linear(y, f"{name}.o", weight, self._bias({f"{name}.o_proj": s.hidden}))

    def _wanted(self, x: str, axis: int) -> str:
        """``x`` at the tokens whose logits are wanted."""
        return self.graph.node("Gather", [x, "logits_index"], axis=axis)

    def _heads(self, x: str, layer: int, parts: str) -> str:
        """Projections of ``x`` for each of ``parts`` ("q", "k", "v") as f[1, heads of all, S, head_dim]."""
        s, g, name = self.sizes, self.graph, f"layers.{layer}.self_attn"
        rows = {f"{name}.{part}_proj": self._counts[part] * s.head_dim for part in parts}
        y = g.linear(x, f"{name}.{parts}", self._matrix(s.hidden, rows), self._bias(rows))
        total = sum(self._counts[part] for part in parts)
        y = g.node("Reshape", [y, g.constant(f"shape_{parts}", [0, 0, total, s.head_dim])])
        return g.node("Transpose", [y], perm=[0, 2, 1, 3])

    def _head_norm(self, x: str, layer: int, parts: str) -> str:
        """Qwen3's norm within each head of ``parts``, f[1, heads of all, S, head_dim]; ``x`` for Qwen2.5."""
        s, g, name = self.sizes, self.graph, f"layers.{layer}.self_attn"
        if s.family != "qwen3_vl":
            return x
        # Queries and keys are scaled differently, but normalised alike: one operator for both.
        x = g.rms_norm(x, "ones", np.ones(s.head_dim), s.epsilon)
        scales = [self._vector(f"{name}.{part}_norm.weight", s.head_dim) for part in parts]
        rows = np.repeat(np.stack(scales), [self._counts[part] for part in parts], axis=0)
        return g.node("Mul", [x, g.weight(f"{name}.{parts}_norm", rows[None, :, None])])

    def _norm(self, x: str, name: str, tensor: str) -> str:
        scale = self._vector(tensor, self.sizes.hidden)
        return self.graph.rms_norm(x, name, scale, self.sizes.epsilon)

    def _parts(self, parts: str) -> str:
        """The constant that splits heads into ``parts``."""
        return self.graph.constant(f"split_{parts}", [self._counts[part] for part in parts])

    @property
    def _counts(self) -> dict[str, int]:
        return {"q": self.sizes.heads, "k": self.sizes.kv_heads, "v": self.sizes.kv_heads}

    def _store(self, cache: str, layer: int, value: str) -> str:
        s, g = self.sizes, self.graph
        out = g.output(f"{cache}_cache_out_{layer}", [1, s.kv_heads, self.length, s.head_dim])
        inputs = [f"{cache}_cache_{layer}", value, "write_indices"]
        return g.node("TensorScatter", inputs, out, axis=2, mode="linear")

    def _matrix(self, columns: int, rows: dict[str, int]) -> Matrix:
        """The weights of modules with their ``rows`` each, one under the other."""
        return self._sized({f"{name}.weight": (count, columns) for name, count in rows.items()})

    def _sized(self, shapes: dict[str, tuple[int, int]], prefixes: tuple[str, ...] = _PREFIXES) -> Matrix:
        names = [self.tensors.name_of(*(prefix + name for prefix in prefixes)) for name in shapes]
        for name, shape in zip(names, shapes.values(), strict=True):
            self.tensors.require(name, shape)
        return self.tensors.matrix(*names)

    def _bias(self, rows: dict[str, int]) -> np.ndarray | None:
        """The biases of modules in one row; None where there are none."""
        names = [f"{name}.bias" for name in rows]
        if not any(prefix + names[0] in self.tensors for prefix in _PREFIXES):
            return None
        return np.concatenate([self._vector(n, size) for n, size in zip(names, rows.values(), strict=True)])

    def _vector(self, name: str, size: int) -> np.ndarray:
        found = self.tensors.name_of(*(prefix + name for prefix in _PREFIXES))
        self.tensors.require(found, (size,))
        return self.tensors[found]

    def _head(self) -> Matrix:
        shape = self.sizes.vocabulary, self.sizes.hidden
        if self.sizes.tied:
            return self._sized({"embed_tokens.weight": shape})
        return self._sized({"lm_head.weight": shape}, ("",))


def write_decoder(
    config: dict[str, Any],
    tensors: TensorFiles,
    path: Path,
    *,
    max_length: int | None = None,
    dtype: Any = np.float32,
    bits: int | None = None,
    external: bool = False,
) -> DecoderSizes:
    """Write the decoder of mllm/config.json and its tensors to ``path``; returns the sizes it has.

    Args:
        max_length, dtype, bits: as `DecoderWriter` has them.
        external: put the weights into a file of their own (`path` with ".data"), as a model of more than two
            gigabytes must.

    Raises:
        CheckpointError: another architecture, or a tensor is missing or of another shape.
        OSError: the disk is full; nothing of the weights is left then.
    """
    sizes = DecoderSizes.from_config(config)
    with ExitStack() as stack:
        data = stack.enter_context(ExternalData(path.with_name(path.name + DATA))) if external else None
        DecoderWriter(sizes, tensors, max_length=max_length, dtype=dtype, bits=bits, data=data).write(path)
    return sizes
