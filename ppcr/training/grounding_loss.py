"""Losses of the prompt MLLM: next token, soft locations, and three training-only supervisors.

The supervisors are small heads thrown away after training; the checkpoint stays a stock Qwen2.5-VL.
``ObjectHead`` makes image tokens say what stands in their cell (every object of every image is a label),
``PlaceHead`` makes image tokens inside the language model spell their objects' coordinates,
``PointingHead`` makes answer tokens point at the cells of targets and landmarks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppcr.data.graph import COLORS, MATERIALS, SHAPES, SIZES
from ppcr.data.repaint import SEEN_PAIRS
from ppcr.prompts import LOCATION_BINS, LOCATIONS_PER_INSTANCE, MAX_TARGETS
from ppcr.training.supervision import QUESTIONS

CLASS_SIZES = (len(SHAPES), len(COLORS), len(MATERIALS), len(SIZES))


def _cells(points: Tensor, grid: int) -> Tensor:
    """int64 [..]: cell index of each point xy in 0..1."""
    place = (points * grid).long().clamp_(0, grid - 1)
    return place[..., 1] * grid + place[..., 0]


def _slots(boxes: Tensor, present: Tensor, grid: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cell and slot of each object [B, N], and which objects get one: a cell's first ``slots`` objects."""
    cells = _cells((boxes[..., :2] + boxes[..., 2:]) / 2, grid)
    same = (cells[:, :, None] == cells[:, None, :]) & present[:, None, :]
    slot = torch.tril(same, -1).sum(-1)
    return cells, slot, present & (slot < slots)


class ObjectHead(nn.Module):
    """Reads each image token: is an object's centre in this cell, which, and how far do its sides reach.

    Args:
        width: channels of an image token.
        grid: cells along one side.
        slots: objects one cell can hold; a cell's objects fill its slots in their order.
    """

    def __init__(self, width: int, grid: int, slots: int = 2) -> None:
        super().__init__()
        self.grid, self.slots = grid, slots
        self.sizes = (1, *CLASS_SIZES, 6)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, slots * sum(self.sizes))

    def forward(
        self, features: Tensor, boxes: Tensor, points: Tensor, classes: Tensor, present: Tensor
    ) -> dict[str, Tensor]:
        """Loss terms.

        Args:
            features: [B, grid*grid, width].
            boxes: [B, N, 4] xyxy 0..1 and points [B, N, 2] of the visible masks.
            classes: int64 [B, N, 4] shape, colour, material, size; a negative one is not known.
            present: bool [B, N].
        """
        batch, count = present.shape
        cells, slot, keep = _slots(boxes, present, self.grid, self.slots)
        out = self.out(self.norm(features)).float().view(batch, -1, self.slots, sum(self.sizes))
        objectness = torch.zeros(out.shape[:3], device=out.device)
        scene = torch.arange(batch, device=out.device)[:, None].expand(-1, count)
        at = (scene[keep], cells[keep], slot[keep])
        objectness[at] = 1.0
        chosen = out[at].split(self.sizes, -1)
        loss_object = (
            F.binary_cross_entropy_with_logits(out[..., 0], objectness, reduction="sum") / keep.sum()
        )
        kept = classes[keep]
        chosen = (chosen[0], self._adjusted(chosen[1], kept[:, 1]), *chosen[2:])
        known = (kept >= 0).sum(0).clamp(min=1)
        terms = [
            F.cross_entropy(chosen[1 + i], kept[:, i], ignore_index=-1, reduction="sum") / known[i]
            for i in range(len(CLASS_SIZES))
        ]
        centre = (torch.stack([cells % self.grid, cells // self.grid], -1) + 0.5) / self.grid
        sides = (
            torch.cat([points - centre, boxes[..., :2] - centre, boxes[..., 2:] - centre], -1)[keep]
            * self.grid
        )
        loss_box = F.smooth_l1_loss(chosen[-1], sides, beta=0.1)
        with torch.no_grad():
            right = torch.stack(
                [(chosen[1 + i].argmax(-1) == kept[:, i]) | (kept[:, i] < 0) for i in range(len(CLASS_SIZES))]
            )
            found = ((out[..., 0] > 0) & (objectness > 0)).sum() / keep.sum()
        return {
            "look": loss_object * 0.5 + sum(terms) + 2.0 * loss_box,
            "seen": right.all(0).float().mean(),
            "found": found,
            "side": loss_box.detach(),
        }

    @staticmethod
    def _adjusted(shapes: Tensor, colors: Tensor) -> Tensor:
        """Logits [M, shapes] adjusted by how often training shows a shape in its object's colour.

        Only whether it does at all is told apart: a shape that never comes in this colour (-inf) is not
        denied, so that an unseen pair is not learnt to be impossible. Colours [M]; a negative one tells
        nothing.
        """
        seen = torch.from_numpy(SEEN_PAIRS).to(colors.device)[colors.clamp(min=0)]
        return shapes.masked_fill(~seen & (colors >= 0)[:, None], float("-inf"))


class PointingHead(nn.Module):
    """Answer tokens choose cells by dot product, and say how many targets there are.

    Three questions: where the targets are, where the landmarks, and where the candidates. One more choice
    stands for "nothing there". Beside the choice, each cell is a yes-or-no question against that choice: a
    model that only ranks cells never learns that the best one may not fit.
    """

    def __init__(self, width: int, grid: int, channels: int = 128) -> None:
        super().__init__()
        self.grid = grid
        self.query = nn.ModuleList(nn.Linear(width, channels) for _ in QUESTIONS)
        self.key = nn.ModuleList(nn.Linear(width, channels) for _ in QUESTIONS)
        self.nothing = nn.Parameter(torch.zeros(len(QUESTIONS), channels))
        self.channels = channels
        self.counts = nn.Linear(width, MAX_TARGETS + 1)

    def forward(
        self,
        answers: Sequence[Tensor],
        image: Sequence[Tensor],
        rows: Tensor,
        centres: Tensor,
        wanted: Tensor,
    ) -> dict[str, Tensor]:
        """Loss terms, and the share of answers whose first choice of a target is right.

        Args:
            answers: per question, hidden states [B, T, width] to ask with.
            image: per question, hidden states [B, grid*grid, width] of image tokens.
            rows: bool [B, T], the M positions that ask.
            centres: [B, N, 2] object centres; wanted: bool [M, 3, N] in the order of ``rows``.
        """
        scores = []
        for query, key, nothing, answer, tokens in zip(
            self.query, self.key, self.nothing, answers, image, strict=True
        ):
            asked = query(answer)
            fitting = (asked @ key(tokens).transpose(1, 2))[rows]
            scores.append(torch.cat([fitting, (asked[rows] @ nothing.to(asked.dtype))[:, None]], -1))
        logits = torch.stack(scores, 1).float() / self.channels**0.5  # [M, 3, cells + 1]
        scene = torch.nonzero(rows)[:, 0]
        cells = _cells(centres, self.grid)[scene]  # [M, N]
        target = torch.zeros_like(logits)
        target.scatter_add_(-1, cells[:, None].expand(-1, len(QUESTIONS), -1), wanted.float())
        target = target.clamp_(max=1.0)
        margins = logits[..., :-1] - logits[..., -1:]
        fits = F.binary_cross_entropy_with_logits(margins, target[..., :-1], reduction="none").sum(-1).mean()
        nothing = (~wanted.any(-1)).float()[..., None]
        target = torch.cat([target[..., :-1], nothing], -1)
        target = target / target.sum(-1, keepdim=True)
        loss = -(target * logits.log_softmax(-1)).sum(-1).mean()
        right = target.gather(-1, logits.argmax(-1, keepdim=True)).gt(0).squeeze(-1).float().mean(0)
        counts = F.cross_entropy(self.counts(answers[0][rows]).float(), wanted[:, 0].sum(-1))
        shares = dict(zip(("pointed", *QUESTIONS[1:]), right, strict=True))
        return {"point": loss, "fits": fits, "many": counts, **shares}


class StandingHead(nn.Module):
    """Answer tokens say of every object whether it stands in the named relation, whatever it is.

    That nothing fits "the cube left of the ball" follows from where the ball is and where the cubes are; the
    targets alone, of which there are none, teach neither.
    """

    def __init__(self, width: int, grid: int, channels: int = 128) -> None:
        super().__init__()
        self.grid, self.channels = grid, channels
        self.query, self.key = nn.Linear(width, channels), nn.Linear(width, channels)

    def forward(
        self, answers: Tensor, image: Tensor, rows: Tensor, centres: Tensor, standing: Tensor, known: Tensor
    ) -> dict[str, Tensor]:
        """Mean cross-entropy over what is known, and the share that is right.

        Args:
            answers: [B, T, width]; image: [B, grid*grid, width]; rows: bool [B, T], the M positions that ask.
            centres: [B, N, 2] object centres; standing, known: bool [M, N] in the order of ``rows``.
        """
        objects = self.key(image).gather(
            1, _cells(centres, self.grid)[..., None].expand(-1, -1, self.channels)
        )
        scores = (self.query(answers) @ objects.transpose(1, 2))[rows].float() / self.channels**0.5
        losses = F.binary_cross_entropy_with_logits(scores, standing.float(), reduction="none")
        right = ((scores > 0) == standing)[known].float()
        return {"stand": (losses * known).sum() / known.sum().clamp(min=1), "standing": right.mean()}


class PlaceHead(nn.Module):
    """Image tokens of the language model spell each object's point and box in location tokens.

    The answer then has to copy a place rather than work it out, and every object of an image teaches it.
    """

    def __init__(self, width: int, grid: int, slots: int = 2) -> None:
        super().__init__()
        self.grid, self.slots = grid, slots
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, slots * LOCATIONS_PER_INSTANCE * width)

    def forward(self, image: Tensor, values: Tensor, present: Tensor, table: Tensor, sigma: float) -> Tensor:
        """Mean cross-entropy over the coordinates of all objects.

        Args:
            image: [B, grid*grid, width] hidden states of image tokens.
            values: [B, N, 6] point and box in 0..1; present: bool [B, N].
            table: [1000, width] embedding rows of the location tokens; sigma: softness in bins.
        """
        cells, slot, keep = _slots(values[..., 2:], present, self.grid, self.slots)
        scene = torch.arange(len(values), device=values.device)[:, None].expand_as(cells)[keep]
        spelled = self.out(self.norm(image[scene, cells[keep]]))
        spelled = spelled.view(len(scene), self.slots, LOCATIONS_PER_INSTANCE, -1)
        spelled = spelled[torch.arange(len(scene), device=values.device), slot[keep]]
        logits = (spelled @ table.T).float().flatten(0, 1)
        soft = location_targets(values[keep].flatten(), sigma)
        return -(soft * logits.log_softmax(-1)).sum(-1).mean()


def location_targets(values: Tensor, sigma: float) -> Tensor:
    """[M, 1000] soft targets: a Gaussian of ``sigma`` bins around each value in 0..1."""
    bins = (torch.arange(LOCATION_BINS, device=values.device) + 0.5) / LOCATION_BINS
    return torch.softmax(-0.5 * ((bins - values[:, None]) * LOCATION_BINS / sigma) ** 2, -1)
