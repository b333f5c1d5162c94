"""Training batches of the prompt MLLM: seeds in, packed conversations and rendered images out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from ppcr.data.dyes import dye
from ppcr.data.expressions import Expression, sample_expressions
from ppcr.data.graph import COLORS, SceneGraph, sample_scene
from ppcr.data.render import render
from ppcr.data.repaint import repaint
from ppcr.training.packing import Packer, stack

OBJECTS = 14
HARD_MIX = {
    "attribute": 0.13,
    "relation": 0.17,
    "between": 0.04,
    "superlative": 0.05,
    "ordinal": 0.07,
    "negation": 0.07,
    "two_hop": 0.06,
    "plural": 0.14,
    "none_attribute": 0.15,
    "none_relation": 0.12,
}
"""What is drawn at level 2: more of what is hard than ``expressions.MIX`` has, which level 3 goes back to."""
NO_NAME = -1
IMAGE_MEAN, IMAGE_STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclass
class Scenes:
    """Rendered side of a batch, on the training device.

    patches [B, n, 384] float32; boxes [B, 14, 4], points [B, 14, 2] in 0..1; classes int64 [B, 14, 4], a
    colour of NO_NAME where an object is repainted; present bool [B, 14]. Objects are in the order of the
    graph.
    """

    patches: Tensor
    boxes: Tensor
    points: Tensor
    classes: Tensor
    present: Tensor

    def __add__(self, other: Scenes) -> Scenes:
        """Both, one after the other."""
        names = Scenes.__dataclass_fields__
        return Scenes(*(torch.cat([getattr(self, name), getattr(other, name)]) for name in names))


def patchify(images: Tensor, patch: int, merge: int) -> Tensor:
    """Patches [B, n, 3*2*patch*patch] of normalised images [B, 3, S, S], as ``ppcr.images.patchify`` does."""
    batch, channels, size, _ = images.shape
    blocks = size // patch // merge
    x = images.view(batch, channels, blocks, merge, patch, blocks, merge, patch)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch, -1, channels, 1, patch, patch)
    return x.expand(-1, -1, -1, 2, -1, -1).reshape(batch, x.shape[1], -1)


def draw(
    graphs: list[SceneGraph],
    size: int,
    patch: int,
    merge: int,
    device: torch.device | str,
    albedo: list[NDArray[np.float32]] | None = None,
) -> Scenes:
    """Render scenes, repainted where ``albedo`` says how, and pad their labels to OBJECTS."""
    rendered = render(graphs, size, device, albedo=albedo)
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    patches = patchify((rendered.image - mean) / std, patch, merge)
    batch, count = rendered.present.shape

    def pad(values: Tensor) -> Tensor:
        out = values.new_zeros((batch, OBJECTS, *values.shape[2:]))
        out[:, :count] = values
        return out

    classes = torch.zeros((batch, OBJECTS, 4), dtype=torch.int64)
    for i, graph in enumerate(graphs):
        classes[i, : len(graph)] = torch.from_numpy(
            np.stack([graph.shape, graph.color, graph.material, graph.size], 1)
        )
    # A dye has a name, but not to the object head.
    classes[..., 1][(classes[..., 1] >= len(COLORS)) | (albedo is not None)] = NO_NAME
    return Scenes(
        patches, pad(rendered.boxes), pad(rendered.points), classes.to(device), pad(rendered.present)
    )


class Conversations(IterableDataset[dict[str, Any]]):
    """Endless batches of packed conversations, from step ``start`` on; a step's batch depends on the seed.

    ``level`` is the grammar's difficulty, -1 for no expressions; 3 is 2 in the shares of ``expressions.MIX``.
    ``looking`` is true while the tower learns: half as many repainted scenes then come along, only to look
    at. ``render_here`` renders in the loading process (CPU training); otherwise the graphs travel and the
    training process renders on its device.
    """

    def __init__(
        self,
        packer: Packer,
        *,
        batch: int,
        seed: int,
        start: int,
        level: Any,
        looking: Any,
        render_here: Any,
    ) -> None:
        self.packer, self.batch, self.seed, self.start = packer, batch, seed, start
        self.level, self.looking, self.render_here = level, looking, render_here

    def __iter__(self) -> Iterator[dict[str, Any]]:
        torch.set_num_threads(1)
        info = torch.utils.data.get_worker_info()
        if info is not None:
            os.nice(5)  # on a small CPU the training threads, which wait for each other, come first
        step, stride = (self.start, 1) if info is None else (self.start + info.id, info.num_workers)
        while True:
            yield self.make(step)
            step += stride

    def make(self, step: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, step))
        graphs = [sample_scene("train", int(s)) for s in rng.integers(0, 2**31 - 1, self.batch)]
        if self.level.value >= 2:
            graphs[1::2] = [dye(graph, rng) for graph in graphs[1::2]]
        packs = [self.packer.pack(graph, self._expressions(graph, rng)) for graph in graphs]
        arrays = stack(packs)
        out: dict[str, Any] = {k: torch.from_numpy(v) for k, v in arrays.items()}
        out["scenes"] = draw(graphs, *self.render_here) if self.render_here else graphs
        if self.looking.value:
            graphs = [sample_scene("train", int(s)) for s in rng.integers(0, 2**31 - 1, self.batch // 2)]
            paint = [repaint(graph, rng) for graph in graphs]
            out["repainted"] = (graphs, paint)
            if self.render_here:
                size, patch, merge, device = self.render_here
                out["repainted"] = draw(graphs, size, patch, merge, device, paint)
        return out

    def _expressions(self, graph: SceneGraph, rng: np.random.Generator) -> list[Expression]:
        level = int(self.level.value)
        if level < 0:
            return []
        mix = HARD_MIX if level == 2 else None
        return sample_expressions(graph, self.packer.conversations, rng, min(level, 2), mix)
