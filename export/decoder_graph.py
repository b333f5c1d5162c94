"""The text decoder of a Qwen2.5-VL as one standard ONNX opset-24 graph with a KV cache updated in place.

Inputs: ``inputs_embeds`` f[1, S, hidden]; ``rope_cos``, ``rope_sin`` f[1, S, head_dim / 2];
``write_indices`` int64[1], the cache position of the first token; ``attn_mask`` bool[1, 1, S, L], True where
a token may look; ``logits_index`` int64[1], the token of the block whose logits are wanted; ``k_cache_i``,
``v_cache_i`` f[1, kv_heads, L, head_dim].
Outputs: ``logits`` f32[1, 1, vocabulary]; ``k_cache_out_i``, ``v_cache_out_i``, which may share memory with
the inputs. Positions and masks are the host's: the graph knows nothing of images or turns. The cache's length
L is the host's choice as well, fixed for a conversation: attention looks at all of it, so a short one is
faster. Of the last layer only the wanted token is computed; the others leave no more than keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.graph import BOOL, FLOAT, INT64, GraphWriter
from ppcr.errors import CheckpointError
from ppcr.tensors import TensorFiles

OPSET = 24
_PREFIXES = ("model.language_model.", "model.")


@dataclass(frozen=True)
class DecoderSizes:
    """What the graph's shapes follow from; read from a Hugging Face config.json by `from_config`."""

    hidden: int
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

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DecoderSizes:
        """From mllm/config.json, as written by transformers 4.x (flat) or 5.x (``text_config``).

        Raises:
            CheckpointError: another architecture, or a field is missing.
        """
        if config.get("model_type") != "qwen2_5_vl":
            raise CheckpointError(f"the decoder export knows qwen2_5_vl, not {config.get('model_type')!r}")
        text = config.get("text_config") or config
        try:
            rope = text.get("rope_parameters") or text["rope_scaling"]
            heads = int(text["num_attention_heads"])
            return cls(
                hidden=int(text["hidden_size"]),
                layers=int(text["num_hidden_layers"]),
                heads=heads,
                kv_heads=int(text["num_key_value_heads"]),
                head_dim=int(text.get("head_dim") or text["hidden_size"] // heads),
                vocabulary=int(text["vocab_size"]),
                epsilon=float(text["rms_norm_eps"]),
                rope_theta=float(rope.get("rope_theta") or text["rope_theta"]),
                mrope_section=tuple(int(n) for n in rope["mrope_section"]),
                mrope_interleaved=bool(rope.get("mrope_interleaved", False)),
                deepstack=0,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"mllm/config.json does not describe a decoder: {error}") from None


class DecoderWriter:
    """Writes one decoder layer by layer.

    Args:
        sizes: shapes.
        tensors: the checkpoint's tensors by name.
        max_length: length of the KV cache in tokens; None leaves it to the host.
        dtype: float32, or float16 for engines that compile it.
    """

    def __init__(
        self,
        sizes: DecoderSizes,
        tensors: TensorFiles,
        *,
        max_length: int | None = None,
        dtype: type[np.floating[Any]] = np.float32,
    ) -> None:
        self.sizes, self.tensors = sizes, tensors
        self.length: int | str = "L" if max_length is None else max_length
        self.graph = GraphWriter(opset=OPSET, dtype=dtype)

    def write(self, path: Path) -> None:
        """Save the decoder's graph."""
        s, g = self.sizes, self.graph
        self._declare_inputs()
        g.output("logits", [1, 1, s.vocabulary], FLOAT)
        x = "inputs_embeds"
        for layer in range(s.layers):
            x = self._layer(x, layer)
            if layer < s.deepstack:
                x = g.node("Add", [x, f"deepstack_{layer}"])
        x = g.rms_norm(x, "norm", self._tensor("norm.weight"), s.epsilon)
        g.node("Cast", [g.linear(x, "lm_head", self._head())], "logits", to=FLOAT)
        g.save("decoder", path)

    def _declare_inputs(self) -> None:
        s, g = self.sizes, self.graph
        g.input("inputs_embeds", [1, "S", s.hidden])
        g.input("rope_cos", [1, "S", s.head_dim // 2])
        g.input("rope_sin", [1, "S", s.head_dim // 2])
        g.input("write_indices", [1], INT64)
        g.input("attn_mask", [1, 1, "S", self.length], BOOL)
        g.input("logits_index", [1], INT64)
        for i in range(s.deepstack):
            g.input(f"deepstack_{i}", [1, "S", s.hidden])
        for i in range(s.layers):
            for cache in "kv":
                g.input(f"{cache}_cache_{i}", [1, s.kv_heads, self.length, s.head_dim])

    def _layer(self, x: str, layer: int) -> str:
        s, g, name = self.sizes, self.graph, f"layers.{layer}"
        y = g.rms_norm(x, f"{name}.norm_1", self._tensor(f"{name}.input_layernorm.weight"), s.epsilon)
        if layer == s.layers - 1:
            x = self._wanted(x, axis=1)
        x = g.node("Add", [x, self._attention(y, layer)])
        y = g.rms_norm(
            x, f"{name}.norm_2", self._tensor(f"{name}.post_attention_layernorm.weight"), s.epsilon
        )
        gate, up, down = (self._tensor(f"{name}.mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
        return g.node("Add", [x, g.gated_mlp(y, f"{name}.mlp", (gate, up), down)])

    def _attention(self, x: str, layer: int) -> str:
        s, g, name = self.sizes, self.graph, f"layers.{layer}.self_attn"
        mask = "attn_mask"
        if layer == s.layers - 1:
            k, v = g.nodes("Split", [self._heads(x, layer, "kv"), self._parts("kv")], 2, axis=1)
            k = g.node("RotaryEmbedding", [k, "rope_cos", "rope_sin"])
            rope = (self._wanted(table, axis=1) for table in ("rope_cos", "rope_sin"))
            q = g.node("RotaryEmbedding", [self._heads(self._wanted(x, axis=1), layer, "q"), *rope])
            mask = self._wanted(mask, axis=2)
        else:
            # One product for queries, keys and values; queries and keys are turned together.
            both = g.constant("qk_v", [s.heads + s.kv_heads, s.kv_heads])
            qk, v = g.nodes("Split", [self._heads(x, layer, "qkv"), both], 2, axis=1)
            qk = g.node("RotaryEmbedding", [qk, "rope_cos", "rope_sin"])
            q, k = g.nodes("Split", [qk, self._parts("qk")], 2, axis=1)
        k, v = (self._store(cache, layer, value) for cache, value in (("k", k), ("v", v)))
        y = g.node("Attention", [q, k, v, mask], is_causal=0)
        y = g.node("Transpose", [y], perm=[0, 2, 1, 3])
        y = g.node("Reshape", [y, g.constant("shape_hidden", [0, 0, s.heads * s.head_dim])])
        return g.linear(y, f"{name}.o", self._tensor(f"{name}.o_proj.weight"))

    def _wanted(self, x: str, axis: int) -> str:
        """``x`` at the one token whose logits are wanted."""
        return self.graph.node("Gather", [x, "logits_index"], axis=axis)

    def _heads(self, x: str, layer: int, parts: str) -> str:
        """Projections of ``x`` for each of ``parts`` ("q", "k", "v") as f[1, heads of all, S, head_dim]."""
        s, g, name = self.sizes, self.graph, f"layers.{layer}.self_attn"
        weights = [self._tensor(f"{name}.{part}_proj.weight") for part in parts]
        biases = [self._optional(f"{name}.{part}_proj.bias") for part in parts]
        bias = None if biases[0] is None else np.concatenate([b for b in biases if b is not None])
        y = g.linear(x, f"{name}.{parts}", np.concatenate(weights), bias)
        total = sum(self._counts[part] for part in parts)
        y = g.node("Reshape", [y, g.constant(f"shape_{parts}", [0, 0, total, s.head_dim])])
        return g.node("Transpose", [y], perm=[0, 2, 1, 3])

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

    def _tensor(self, name: str) -> np.ndarray:
        return self.tensors.find(*(prefix + name for prefix in _PREFIXES))

    def _optional(self, name: str) -> np.ndarray | None:
        there = any(prefix + name in self.tensors for prefix in _PREFIXES)
        return self._tensor(name) if there else None

    def _head(self) -> np.ndarray:
        tied = tuple(prefix + "embed_tokens.weight" for prefix in _PREFIXES)
        return self.tensors.find("lm_head.weight", *tied)


def write_decoder(
    config: dict[str, Any],
    tensors: TensorFiles,
    path: Path,
    *,
    max_length: int | None = None,
    dtype: type[np.floating[Any]] = np.float32,
) -> DecoderSizes:
    """Write the decoder of mllm/config.json and its tensors to ``path``; returns the sizes it has.

    Raises:
        CheckpointError: another architecture, or a tensor is missing.
    """
    sizes = DecoderSizes.from_config(config)
    DecoderWriter(sizes, tensors, max_length=max_length, dtype=dtype).write(path)
    return sizes
