"""Losses of the segmenter: masks, and aids that teach what stands where and what words mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppcr.data.graph import COLORS, MATERIALS, SHAPES, SIZES
from ppcr.model.layers import grid_centers
from ppcr.training.segmenter_data import ScenePool, Targets


@dataclass(frozen=True)
class LossWeights:
    """Weights of the parts of the loss."""

    dice: float = 1.0
    focal: float = 1.0
    score: float = 0.5
    dense: float = 0.4
    words: float = 0.3


def mask_loss(logits: Tensor, coverage: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and focal loss of logits and soft truth, both f32[B, K, h, w] -> two means over prompts.

    The focal term is summed over pixels and divided by the object's area: small objects count as much.
    """
    probability = logits.sigmoid()
    overlap = (probability * coverage).sum((-1, -2))
    area = coverage.sum((-1, -2))
    # With soft truth p*t would be best at hard masks; the squared form has its optimum at p = t.
    squares = (probability.square() + coverage.square()).sum((-1, -2))
    dice = 1.0 - (2.0 * overlap + 1.0) / (squares + 1.0)
    error = (probability - coverage).square()
    focal = (error * F.binary_cross_entropy_with_logits(logits, coverage, reduction="none")).sum((-1, -2))
    return dice.mean(), (focal / (area + 20.0)).mean()


def mask_iou(predicted: Tensor, truth: Tensor) -> Tensor:
    """IoU of bool masks [..., h, w]; 1 where both are empty."""
    union = (predicted | truth).sum((-1, -2))
    return torch.where(union > 0, (predicted & truth).sum((-1, -2)) / union.clamp(min=1), 1.0)


class DenseHead(nn.Module):
    """Training only: reads each cell's object (shape, colour, material, size, box) from image features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.sizes = (len(SHAPES), len(COLORS), len(MATERIALS), len(SIZES), 1, 4)
        self.head = nn.Conv2d(dim, sum(self.sizes), 1)

    def forward(self, features: Tensor, pool: ScenePool, rows: Tensor, targets: Targets) -> Tensor:
        """features f[B, C, g, g] of the scenes at `rows` of the pool -> the summed loss, a scalar."""
        grid = features.shape[-1]
        step = targets.labels.shape[-1] // grid
        label = targets.labels[:, step // 2 :: step, step // 2 :: step].flatten(1).long()
        parts = self.head(features).float().flatten(2).transpose(1, 2).split(self.sizes, dim=-1)
        inside = label > 0
        loss = F.binary_cross_entropy_with_logits(parts[4].squeeze(-1), inside.float())
        slot = (label - 1).clamp(min=0)
        attributes = torch.gather(pool.attributes[rows], 1, slot[..., None].expand(-1, -1, 4))
        for index in range(4):
            loss = loss + 0.5 * F.cross_entropy(parts[index][inside], attributes[..., index][inside])
        boxes = torch.gather(pool.boxes[rows], 1, slot[..., None].expand(-1, -1, 4))
        offsets = 10.0 * (boxes - grid_centers(grid).to(boxes.device).repeat(1, 2))
        return loss + F.smooth_l1_loss(parts[5][inside], offsets[inside], beta=0.1)


class WordHead(nn.Module):
    """Training only: two text tokens point, by a dot product, at the cells of objects that a text speaks of.

    The first at all that fit category and attributes, the second at the landmarks. This grounds words long
    before masks drawn from text alone are good enough to teach them.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cells = nn.Conv2d(dim, dim, 1)
        self.words = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))
        self.bias = nn.Parameter(torch.full((2,), -3.0))

    def forward(self, features: Tensor, text: Tensor, has_text: Tensor, targets: Targets) -> Tensor:
        """features f[B, C, g, g], text tokens f[B, K, >= 2, C], has_text bool[B, K] -> a scalar."""
        grid = features.shape[-1]
        step = targets.labels.shape[-1] // grid
        label = targets.labels[:, None, step // 2 :: step, step // 2 :: step].long()
        keys = self.cells(features).flatten(2).unsqueeze(1)
        loss = features.new_zeros((), dtype=torch.float32)
        for index, bits in enumerate((targets.candidates, targets.anchors)):
            truth = ((bits[..., None, None] >> (label - 1).clamp(min=0)) & 1) * (label > 0)
            query = self.words[index](text[:, :, index, None])
            logits = (query @ keys).float().squeeze(2) * keys.shape[2] ** -0.5 + self.bias[index]
            wanted = has_text & (bits > 0)
            dice, focal = mask_loss(logits.unflatten(-1, (grid, grid))[wanted], truth[wanted].float())
            loss = loss + (dice + focal).nan_to_num(0.0)
        return loss
