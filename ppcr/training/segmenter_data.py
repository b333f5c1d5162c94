"""Training data of the segmenter: a pool of rendered scenes, and prompts with realistic errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ppcr.data.expressions import Phrase, sample_expressions
from ppcr.data.graph import CROWDED_OBJECTS, SceneGraph, Split, sample_scene
from ppcr.data.render import render
from ppcr.model.prompt_encoder import Prompts

MAX_OBJECTS = CROWDED_OBJECTS[1]
_RENDER_BATCH = 32


@dataclass(frozen=True)
class PromptMix:
    """How prompts are drawn for training.

    drop_text, drop_spatial: shares of prompts with only the other half; text alone only where it names one.
    wrong_box: share of one-object texts whose box and point are another object's: the text has to win.
    jitter: (share, low, high): classes of box error; the standard deviation, in image widths, is drawn
        from low..high, and moves centre, edges and point.
    levels: shares of the expression levels 0, 1, 2.
    """

    drop_text: float = 0.15
    drop_spatial: float = 0.35
    wrong_box: float = 0.06
    jitter: tuple[tuple[float, float, float], ...] = (
        (0.3, 0.0, 0.004),
        (0.5, 0.01, 0.035),
        (0.2, 0.035, 0.08),
    )
    levels: tuple[float, float, float] = (0.2, 0.2, 0.6)


@dataclass(frozen=True)
class Targets:
    """labels u8[B, S, S]: 0 table, i + 1 object i. The others int64[B, K], as in Choice."""

    labels: Tensor
    wanted: Tensor
    candidates: Tensor
    anchors: Tensor

    def masks(self) -> Tensor:
        """bool[B, K, S, S]"""
        return self.labels[:, None] == (self.wanted + 1)[..., None, None].to(self.labels.dtype)

    def coverage(self) -> Tensor:
        """Share of each 2x2 block that the object covers, f32[B, K, S/2, S/2]: edges finer than a logit."""
        return F.avg_pool2d(self.masks().float(), 2)


class ScenePool:
    """A ring of rendered scenes on the training device; each is used a few times with ever new prompts.

    images u8[C, 3, S, S], labels u8[C, S, S], boxes f32[C, 14, 4] and points f32[C, 14, 2] as in render;
    attributes int64[C, 14, 4]: shape, color, material, size.
    """

    def __init__(
        self,
        capacity: int,
        *,
        split: Split = "train",
        size: int = 256,
        device: torch.device | str = "cpu",
        first: int = 0,
    ) -> None:
        self.capacity, self.split, self.size, self.next_seed = capacity, split, size, first
        self.device = torch.device(device)
        self.graphs: list[SceneGraph] = []
        self._write = 0
        self.images = torch.zeros((capacity, 3, size, size), dtype=torch.uint8, device=self.device)
        self.labels = torch.zeros((capacity, size, size), dtype=torch.uint8, device=self.device)
        self.boxes = torch.zeros((capacity, MAX_OBJECTS, 4), device=self.device)
        self.points = torch.zeros((capacity, MAX_OBJECTS, 2), device=self.device)
        self.attributes = torch.zeros((capacity, MAX_OBJECTS, 4), dtype=torch.int64, device=self.device)

    def __len__(self) -> int:
        return len(self.graphs)

    def add(self, count: int) -> None:
        """Render the next `count` scenes over the oldest ones."""
        while count > 0:
            batch = min(count, _RENDER_BATCH, self.capacity)
            graphs = [sample_scene(self.split, self.next_seed + i) for i in range(batch)]
            rendered = render(graphs, size=self.size, device=self.device)
            rows = [(self._write + i) % self.capacity for i in range(batch)]
            n = rendered.masks.shape[1]
            order = torch.arange(1, n + 1, device=self.device, dtype=torch.uint8)
            self.images[rows] = (rendered.image * 255.0).round().to(torch.uint8)
            self.labels[rows] = (rendered.masks * order[:, None, None]).amax(1)
            self.boxes[rows, :n] = rendered.boxes
            self.points[rows, :n] = rendered.points
            self.attributes[rows, :n] = _attributes(graphs, n).to(self.device)
            for row, graph in zip(rows, graphs, strict=True):
                if row == len(self.graphs):
                    self.graphs.append(graph)
                else:
                    self.graphs[row] = graph
            self._write = (self._write + batch) % self.capacity
            self.next_seed += batch
            count -= batch


def _attributes(graphs: list[SceneGraph], slots: int) -> Tensor:
    values = np.zeros((len(graphs), slots, 4), np.int64)
    for row, graph in zip(values, graphs, strict=True):
        row[: len(graph)] = np.stack((graph.shape, graph.color, graph.material, graph.size), axis=1)
    return torch.from_numpy(values)


@dataclass(frozen=True)
class Choice:
    """A prompt to make: the wanted object, the object whose box is given (-1: none), the text ("": none).

    unique: the text names this object alone. candidates, anchors: objects, as bits, that fit the text's
    category and attributes, and those that its relation refers to.
    """

    wanted: int
    boxed: int
    text: str
    unique: bool = False
    candidates: int = 0
    anchors: int = 0


def choose(graph: SceneGraph, count: int, mix: PromptMix, rng: np.random.Generator) -> list[Choice]:
    """`count` prompts of one scene: about two thirds from expressions, the others any object without text."""
    level = int(rng.choice(3, p=mix.levels))
    choices: list[Choice] = []
    for expression in sample_expressions(graph, count, rng, level=level):
        if not expression.targets or len(choices) == count:
            continue
        wanted = int(rng.choice(expression.targets))
        boxed, text, draw = wanted, expression.semantic.text, rng.random()
        unique = len(expression.targets) == 1
        if draw < mix.drop_text:
            text = ""
        elif unique and draw < mix.drop_text + mix.drop_spatial:
            boxed = -1
        elif unique and draw > 1.0 - mix.wrong_box:
            boxed = int(rng.integers(len(graph)))
        anchors = sum(1 << i for i in expression.landmarks)
        choices.append(Choice(wanted, boxed, text, unique, _fitting(graph, expression.query.phrase), anchors))
    while len(choices) < count:
        wanted = int(rng.integers(len(graph)))
        choices.append(Choice(wanted, wanted, ""))
    return choices


def _fitting(graph: SceneGraph, phrase: Phrase) -> int:
    """Objects, as bits, with the properties of a phrase, its relation left out."""
    wanted = (phrase.size, phrase.color, phrase.material, phrase.shape)
    return sum(
        1 << i
        for i in range(len(graph))
        if all(
            word == said if not said.startswith("not ") else word != said[4:]
            for word, said in zip(graph.describe(i), wanted, strict=True)
            if said
        )
    )


def jitter(
    boxes: NDArray[np.float32],
    points: NDArray[np.float32],
    sigma: NDArray[np.float32],
    rng: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Boxes f32[N, 4] and points f32[N, 2] moved by normal errors of size `sigma` f32[N]; stays in 0..1.

    Half of the error is shared by box and point, as when a whole prediction lands beside the object.
    """
    scale = sigma[:, None]
    shift = rng.standard_normal((len(boxes), 2)) * scale * 0.8
    moved = boxes + np.tile(shift, 2) + rng.standard_normal(boxes.shape) * scale * 0.6
    low, high = np.minimum(moved[:, :2], moved[:, 2:]), np.maximum(moved[:, :2], moved[:, 2:])
    placed = points + shift + rng.standard_normal(points.shape) * scale * 0.6
    moved = np.concatenate([low, high], axis=1)
    return moved.clip(0.0, 1.0).astype(np.float32), placed.clip(0.0, 1.0).astype(np.float32)


class TextTable:
    """Texts -> padded rows of the MLLM's input embedding.

    Args:
        embedding: f32[V, E], kept frozen on the training device.
        encode: text -> token ids.
    """

    def __init__(self, embedding: Tensor, encode: Callable[[str], list[int]]) -> None:
        self.embedding = embedding
        self.encode = lru_cache(maxsize=100_000)(encode)

    def __call__(self, texts: list[list[str]], multiple: int = 8) -> tuple[Tensor, Tensor]:
        """[B][K] texts, "" for none -> f32[B, K, T, E] and mask bool[B, K, T], T a multiple of `multiple`."""
        ids = [[self.encode(text) if text else [] for text in row] for row in texts]
        longest = max(1, max(len(i) for row in ids for i in row))
        length = -(-longest // multiple) * multiple
        table = np.zeros((len(ids), len(ids[0]), length), np.int64)
        mask = np.zeros(table.shape, bool)
        for b, row in enumerate(ids):
            for k, tokens in enumerate(row):
                table[b, k, : len(tokens)] = tokens
                mask[b, k, : len(tokens)] = True
        device = self.embedding.device
        return self.embedding[torch.from_numpy(table).to(device)], torch.from_numpy(mask).to(device)


def build(
    pool: ScenePool,
    rows: NDArray[np.int64],
    choices: list[list[Choice]],
    sigma: NDArray[np.float32],
    table: TextTable,
    rng: np.random.Generator,
) -> tuple[Prompts, Targets]:
    """Prompts and truth of the scenes at `rows` of the pool; sigma f32[B, K] is each prompt's box error."""
    index = torch.from_numpy(rows).to(pool.device)
    wanted = np.array([[c.wanted for c in row] for row in choices], np.int64)
    boxed = np.array([[c.boxed for c in row] for row in choices])
    all_boxes, all_points = pool.boxes[index].cpu().numpy(), pool.points[index].cpu().numpy()
    first = np.arange(len(rows))[:, None]
    source = np.maximum(boxed, 0)
    shape = wanted.shape
    true_boxes = all_boxes[first, source].reshape(-1, 4)
    true_points = all_points[first, source].reshape(-1, 2)
    boxes, points = jitter(true_boxes, true_points, sigma.reshape(-1), rng)
    embeddings, mask = table([[c.text for c in row] for row in choices])
    valid = (boxed >= 0).astype(np.float32)
    given: Mapping[str, NDArray[np.float32]] = {
        "boxes": boxes.reshape(*shape, 4) * valid[..., None],
        "points": points.reshape(*shape, 2) * valid[..., None],
        "spatial_valid": valid,
    }
    tensors = {name: torch.from_numpy(value).to(pool.device) for name, value in given.items()}
    prompts = Prompts(**tensors, text_embeddings=embeddings, text_mask=mask)
    truth = [wanted, *([[getattr(c, n) for c in row] for row in choices] for n in ("candidates", "anchors"))]
    return prompts, Targets(pool.labels[index], *(torch.tensor(t, device=pool.device) for t in truth))


def sample_sigma(shape: tuple[int, int], mix: PromptMix, rng: np.random.Generator) -> NDArray[np.float32]:
    """Box errors f32[B, K] drawn from the classes of `mix`."""
    shares, low, high = (np.array(column) for column in zip(*mix.jitter, strict=True))
    kind = rng.choice(len(shares), size=shape, p=shares)
    return (low[kind] + rng.random(shape) * (high - low)[kind]).astype(np.float32)
