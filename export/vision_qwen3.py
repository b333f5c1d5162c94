"""The vision tower of a Qwen3-VL: learned positions, plain feed-forward layers, DeepStack."""

from __future__ import annotations

import numpy as np

from export.vision_graph import VisionSizes, VisionWriter

_EPSILON = 1e-6


class Qwen3VisionWriter(VisionWriter):
    """What differs from Qwen2.5-VL; every block attends to the whole image."""

    def _embed(self, x: str) -> str:
        g, s = self.graph, self.sizes
        x = g.linear(x, "patch_embed", self._patch_matrix())
        name = self._name("pos_embed.weight")
        self.tensors.require(name, (s.positions**2, s.hidden))
        places = learned_positions(s, self.tensors[name]) + self._vector("patch_embed.proj.bias", s.hidden)
        return g.node("Add", [x, g.constant("positions", places, g.dtype)])

    def _norm(self, x: str, name: str) -> str:
        return self._layer_norm(x, name, self.sizes.hidden)

    def _mlp(self, x: str, name: str) -> str:
        g, s = self.graph, self.sizes
        x = g.linear(x, f"{name}.1", *self._linear(f"{name}.linear_fc1", s.intermediate, s.hidden))
        x = g.node("Gelu", [x], approximate="tanh")
        return g.linear(x, f"{name}.2", *self._linear(f"{name}.linear_fc2", s.hidden, s.intermediate))

    def _after(self, x: str, block: int) -> None:
        s, g = self.sizes, self.graph
        if block in s.deepstack:
            level = s.deepstack.index(block)
            name = f"deepstack_merger_list.{level}"
            x = self._layer_norm(self._together(x), f"{name}.norm", s.merged)
            self._hand_out(x, name, g.output(f"deepstack_{level}", [s.tokens, s.out]))

    def _merge(self, x: str) -> None:
        x = self._layer_norm(x, "merger.norm", self.sizes.hidden)
        self._hand_out(self._together(x), "merger", "image_features")

    def _together(self, x: str) -> str:
        """The patches of a token side by side: [tokens, merged]."""
        s, g = self.sizes, self.graph
        return g.node("Reshape", [x, g.constant("shape_merged", [s.tokens, s.merged])])

    def _hand_out(self, x: str, name: str, output: str) -> None:
        s, g = self.sizes, self.graph
        x = g.linear(x, f"{name}.1", *self._linear(f"{name}.linear_fc1", s.merged, s.merged))
        weight, bias = self._linear(f"{name}.linear_fc2", s.out, s.merged)
        x = g.node("MatMul", [g.node("Gelu", [x]), g.matrix(f"{name}.2.weight", weight)])
        g.node("Add", [x, g.weight(f"{name}.2.bias", bias)], output)

    def _layer_norm(self, x: str, name: str, width: int) -> str:
        scale, bias = (self._vector(f"{name}.{part}", width) for part in ("weight", "bias"))
        return self.graph.layer_norm(x, name, scale, bias, _EPSILON)


def learned_positions(sizes: VisionSizes, table: np.ndarray) -> np.ndarray:
    """f32 [patches, hidden]: the square of embeddings, drawn out linearly to the grid from corner to corner.

    table: f32 [positions ** 2, hidden]. Rows come out in the order of the patches, token by token.
    """
    (rows, columns), side, merge = sizes.grid, sizes.positions, sizes.merge
    square = table.reshape(side, side, -1)
    for axis, count in enumerate((rows, columns)):
        place = np.arange(count, dtype=np.float32) * np.float32(side - 1) / np.float32(max(count - 1, 1))
        low = np.floor(place).astype(np.int64)
        share = (place - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1)).astype(np.float32)
        high = np.minimum(low + 1, side - 1)
        square = square.take(low, axis) * (1 - share) + square.take(high, axis) * share
    cells = square.reshape(rows // merge, merge, columns // merge, merge, -1).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(cells.reshape(sizes.patches, -1), np.float32)
