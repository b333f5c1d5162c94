"""The vision tower of a Qwen2.5-VL for images of one size, as a standard ONNX graph.

``pixel_values`` f[patches, patch_dim], ordered as `ppcr.images.patchify` does, becomes ``image_features``
f[image_tokens, hidden] and, for Qwen3-VL, ``deepstack_i`` of the same shape. The grid is fixed, so rotary
tables, window order and masks are constants. A bundle that takes several sizes has a graph for each; the
weights, where they lie beside the graph, are written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.external import ExternalData
from export.graph import GraphWriter
from ppcr.errors import CheckpointError
from ppcr.tensors import Matrix, TensorFiles

OPSET = 24
_PREFIXES = ("model.visual.", "visual.")
_EPSILON = 1e-6
_ROPE_THETA = 10000.0
_ACTIVATIONS = {"qwen2_5_vl": "silu", "qwen3_vl": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class VisionSizes:
    """Sizes of the tower and the grid of patches (rows, columns) it is written for.

    Qwen2.5-VL attends within windows of ``window`` pixels but for the blocks ``full_attention``. Qwen3-VL
    always attends to everything, learns ``positions`` x ``positions`` embeddings, and hands out features
    after the blocks ``deepstack``.
    """

    family: str
    depth: int
    hidden: int
    intermediate: int
    heads: int
    out: int
    patch: int
    merge: int
    temporal: int
    channels: int
    grid: tuple[int, int]
    window: int = 0
    full_attention: frozenset[int] = frozenset()
    positions: int = 0
    deepstack: tuple[int, ...] = ()

    @classmethod
    def from_config(cls, config: dict[str, Any], image_size: tuple[int, int]) -> VisionSizes:
        """From mllm/config.json and the (height, width) in pixels images are stretched to.

        Raises:
            CheckpointError: another architecture, a missing field, or a size that is no multiple of
                patch * merge.
        """
        try:
            vision, family = config["vision_config"], str(config["model_type"])
            patch, merge = int(vision["patch_size"]), int(vision["spatial_merge_size"])
            if any(side % (patch * merge) for side in image_size):
                raise CheckpointError(f"image size {image_size} is not a multiple of {patch * merge} pixels")
            wanted = _ACTIVATIONS[family]
            if vision.get("hidden_act", wanted) != wanted:
                raise ValueError(f"the activation is {vision['hidden_act']!r}, not {wanted!r}")
            special: dict[str, Any] = {
                "window": int(vision["window_size"]),
                "full_attention": frozenset(int(i) for i in vision["fullatt_block_indexes"]),
            } if family == "qwen2_5_vl" else {
                "positions": round(int(vision["num_position_embeddings"]) ** 0.5),
                "deepstack": tuple(int(i) for i in vision["deepstack_visual_indexes"]),
            }  # fmt: skip
            return cls(
                family=family,
                depth=int(vision["depth"]),
                hidden=int(vision["hidden_size"]),
                intermediate=int(vision["intermediate_size"]),
                heads=int(vision["num_heads"]),
                out=int(vision["out_hidden_size"]),
                patch=patch,
                merge=merge,
                temporal=int(vision["temporal_patch_size"]),
                channels=int(vision.get("in_channels", vision.get("in_chans", 3))),
                grid=(image_size[0] // patch, image_size[1] // patch),
                **special,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"mllm/config.json does not describe a vision tower: {error!r}") from None

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def patch_dim(self) -> int:
        return self.channels * self.temporal * self.patch**2

    @property
    def tokens(self) -> int:
        return self.patches // self.merge**2

    @property
    def merged(self) -> int:
        """Width of the patches of one token together."""
        return self.hidden * self.merge**2


@dataclass(frozen=True)
class Windows:
    """Order of the merged cells, window by window, and how many cells each window has."""

    order: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, sizes: VisionSizes) -> Windows:
        rows, columns = (side // sizes.merge for side in sizes.grid)
        if not sizes.window:
            return cls(np.arange(sizes.tokens), np.array([sizes.tokens]))
        side = sizes.window // sizes.merge // sizes.patch
        row, column = np.divmod(np.arange(rows * columns), columns)
        number = row // side * -(-columns // side) + column // side
        return cls(np.argsort(number, kind="stable"), np.bincount(number))

    @property
    def in_place(self) -> bool:
        """True where the order is that of the image already."""
        return bool((np.diff(self.order) == 1).all())

    @property
    def equal(self) -> bool:
        return bool((self.sizes == self.sizes[0]).all())


def rotary_tables(sizes: VisionSizes, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, f32[1, patches, head_dim / 2]: half of the angles follow the row, half the column."""
    height, width, merge = *sizes.grid, sizes.merge
    places = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    places = places.reshape(height // merge, merge, width // merge, merge, 2).transpose(0, 2, 1, 3, 4)
    places = places.reshape(sizes.tokens, merge**2, 2)[order].reshape(-1, 2)
    spatial = sizes.head_dim // 2
    inverse = 1.0 / _ROPE_THETA ** (np.arange(0, spatial, 2, dtype=np.float32) / np.float32(spatial))
    angles = (places[:, :, None] * inverse.astype(np.float32)).reshape(1, sizes.patches, -1)
    return np.cos(angles), np.sin(angles)


class VisionWriter:
    """Writes one tower block by block; tokens are kept in window order between them.

    Args:
        sizes: shapes. tensors: the checkpoint's tensors by name.
        dtype, bits: number formats as `export.decoder_graph.DecoderWriter` has them.
        data: where the weights go; None: into the model.
    """

    def __init__(
        self,
        sizes: VisionSizes,
        tensors: TensorFiles,
        dtype: Any = np.float32,
        *,
        bits: int | None = None,
        data: ExternalData | None = None,
    ) -> None:
        self.sizes, self.tensors = sizes, tensors
        self.windows = Windows.of(sizes)
        self.graph = GraphWriter(opset=OPSET, dtype=dtype, bits=bits, data=data)

    def write(self, path: Path) -> None:
        """Save the tower's graph."""
        s, g = self.sizes, self.graph
        x = g.input("pixel_values", [s.patches, s.patch_dim])
        g.output("image_features", [s.tokens, s.out])
        if not self.windows.in_place:
            x = self._reorder(x, self.windows.order, s.merge**2)
        x = self._embed(x)
        # Not weights: they follow from the grid, which graphs that share their weights need not share.
        for name, table in zip(("rope_cos", "rope_sin"), rotary_tables(s, self.windows.order), strict=True):
            g.constant(name, table, g.dtype)
        for block in range(s.depth):
            x = self._block(x, block)
            self._after(x, block)
        self._merge(x)
        g.save("vision", path)

    def _embed(self, x: str) -> str:
        return self.graph.linear(x, "patch_embed", self._patch_matrix())

    def _patch_matrix(self) -> Matrix:
        s, name = self.sizes, self._name("patch_embed.proj.weight")
        self.tensors.require(name, (s.hidden, s.channels, s.temporal, s.patch, s.patch))
        return self.tensors.matrix(name)

    def _after(self, x: str, block: int) -> None:
        """What a block's output is used for besides the next block."""

    def _block(self, x: str, block: int) -> str:
        g, name = self.graph, f"blocks.{block}"
        x = g.node("Add", [x, self._attention(self._norm(x, f"{name}.norm1"), block)])
        # Named for runtimes that compute the blocks up to some one in other numbers than the rest.
        return g.node("Add", [x, self._mlp(self._norm(x, f"{name}.norm2"), f"{name}.mlp")], f"{name}.out")

    def _norm(self, x: str, name: str) -> str:
        return self.graph.rms_norm(x, name, self._vector(f"{name}.weight", self.sizes.hidden), _EPSILON)

    def _mlp(self, x: str, name: str) -> str:
        s = self.sizes
        both = [f"{name}.{part}_proj" for part in ("gate", "up")]
        weights = [self._name(f"{part}.weight") for part in both]
        for weight in weights:
            self.tensors.require(weight, (s.intermediate, s.hidden))
        down, down_bias = self._linear(f"{name}.down_proj", s.hidden, s.intermediate)
        return self.graph.gated_mlp(
            x,
            name,
            self.tensors.matrix(*weights),
            down,
            gate_up_bias=np.concatenate([self._vector(f"{part}.bias", s.intermediate) for part in both]),
            down_bias=down_bias,
        )

    def _attention(self, x: str, block: int) -> str:
        s, g, name = self.sizes, self.graph, f"blocks.{block}.attn"
        qkv = g.linear(x, f"{name}.qkv", *self._linear(f"{name}.qkv", 3 * s.hidden, s.hidden))
        qkv = g.node("Reshape", [qkv, g.constant("shape_heads", [1, s.patches, 3 * s.heads, s.head_dim])])
        qkv = g.node("Transpose", [qkv], perm=[0, 2, 1, 3])
        qk, v = g.nodes("Split", [qkv, g.constant("qk_v", [2 * s.heads, s.heads])], 2, axis=1)
        qk = g.node("RotaryEmbedding", [qk, "rope_cos", "rope_sin"])
        q, k = g.nodes("Split", [qk], 2, axis=1, num_outputs=2)
        y = g.node("Transpose", [self._look(q, k, v, block)], perm=[0, 2, 1, 3])
        y = g.node("Reshape", [y, g.constant("shape_hidden", [s.patches, s.hidden])])
        return g.linear(y, f"{name}.proj", *self._linear(f"{name}.proj", s.hidden, s.hidden))

    def _look(self, q: str, k: str, v: str, block: int) -> str:
        """Attention of [1, heads, patches, head_dim] over everything, or within windows."""
        s, g, windows = self.sizes, self.graph, self.windows
        if block in s.full_attention or len(windows.sizes) == 1:
            return g.node("Attention", [q, k, v], is_causal=0)
        if windows.equal:
            # Heads as the batch and windows as the heads: no axis has to move.
            shape = [s.heads, len(windows.sizes), s.patches // len(windows.sizes), s.head_dim]
            split = g.constant("shape_windows", shape)
            y = g.node("Attention", [g.node("Reshape", [z, split]) for z in (q, k, v)], is_causal=0)
            return g.node("Reshape", [y, g.constant("shape_whole", [1, s.heads, s.patches, s.head_dim])])
        number = np.repeat(np.arange(len(windows.sizes)), windows.sizes * s.merge**2)
        mask = g.constant("window_mask", (number[:, None] == number)[None, None], np.bool_)
        return g.node("Attention", [q, k, v, mask], is_causal=0)

    def _merge(self, x: str) -> None:
        s, g = self.sizes, self.graph
        x = g.rms_norm(x, "merger.norm", self._vector("merger.ln_q.weight", s.hidden), _EPSILON)
        x = g.node("Reshape", [x, g.constant("shape_merged", [s.tokens, s.merged])])
        x = g.linear(x, "merger.0", *self._linear("merger.mlp.0", s.merged, s.merged))
        weight, bias = self._linear("merger.mlp.2", s.out, s.merged)
        x = g.node("MatMul", [g.node("Gelu", [x]), g.matrix("merger.2.weight", weight)])
        bias_name = g.weight("merger.2.bias", bias)
        if self.windows.in_place:
            g.node("Add", [x, bias_name], "image_features")
        else:
            back = g.constant("image_order", np.argsort(self.windows.order))
            g.node("Gather", [g.node("Add", [x, bias_name]), back], "image_features", axis=0)

    def _reorder(self, x: str, order: np.ndarray, group: int) -> str:
        rows = (order[:, None] * group + np.arange(group)).reshape(-1)
        return self.graph.node("Gather", [x, self.graph.constant("window_order", rows)], axis=0)

    def _linear(self, name: str, out: int, inputs: int) -> tuple[Matrix, np.ndarray]:
        weight = self._name(f"{name}.weight")
        self.tensors.require(weight, (out, inputs))
        return self.tensors.matrix(weight), self._vector(f"{name}.bias", out)

    def _vector(self, name: str, size: int) -> np.ndarray:
        found = self._name(name)
        self.tensors.require(found, (size,))
        return self.tensors[found]

    def _name(self, name: str) -> str:
        return self.tensors.name_of(*(prefix + name for prefix in _PREFIXES))


def write_vision(
    config: dict[str, Any],
    tensors: TensorFiles,
    path: Path,
    *,
    image_size: tuple[int, int],
    dtype: Any = np.float32,
    bits: int | None = None,
    data: ExternalData | None = None,
) -> VisionSizes:
    """Write the tower of mllm/config.json for images of ``image_size`` (height, width) to ``path``.

    Args:
        dtype, bits: number formats as `export.decoder_graph.DecoderWriter` has them.
        data: a file in the same folder for the weights, which graphs of other sizes may share.

    Raises:
        CheckpointError: another architecture, a missing tensor or one of another shape, or an impossible
            image size.
    """
    from export.vision_qwen3 import Qwen3VisionWriter

    sizes = VisionSizes.from_config(config, image_size)
    writer = Qwen3VisionWriter if sizes.family == "qwen3_vl" else VisionWriter
    writer(sizes, tensors, dtype, bits=bits, data=data).write(path)
    return sizes
