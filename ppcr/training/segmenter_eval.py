"""The segmenter's held-out figures while it trains: given boxes and texts, no MLLM in the loop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ppcr.model.segmenter import Segmenter, normalize
from ppcr.training.common import autocast
from ppcr.training.segmenter_data import Choice, PromptMix, ScenePool, TextTable, build, choose
from ppcr.training.segmenter_loss import mask_iou


def pixels(pool: ScenePool, index: Tensor, model: Segmenter) -> Tensor:
    """Scenes of the pool as the model's input, f32[B, 3, S, S], channels last."""
    image = normalize(pool.images[index].float() / 255.0, model.config)
    return image.contiguous(memory_format=torch.channels_last)


class Evaluation:
    """mIoU at full size on fixed val scenes, by kind of prompt."""

    def __init__(self, size: int, device: torch.device, scenes: int = 64, prompts: int = 4) -> None:
        self.pool = ScenePool(scenes, split="val", size=size, device=device)
        self.pool.add(scenes)
        rng = np.random.default_rng(1)
        mix = PromptMix(drop_text=0.0, drop_spatial=0.0, wrong_box=0.0, levels=(0.0, 0.0, 1.0))
        self.choices = [choose(graph, prompts, mix, rng) for graph in self.pool.graphs]

    @torch.no_grad()
    def __call__(self, model: Segmenter, table: TextTable) -> dict[str, float]:
        """mIoU with exact and jittered boxes (sigma 0.025), without text, without boxes; score error.

        The figure without boxes counts texts that name one object only.
        """
        model.eval()
        figures: dict[str, float] = {}
        for name, sigma, text, spatial in (
            ("val_true_box", 0.0, True, True),
            ("val_jitter", 0.025, True, True),
            ("val_jitter_no_text", 0.025, False, True),
            ("val_text_only", 0.0, True, False),
        ):
            iou, score = self._measure(model, table, sigma, text, spatial)
            figures[name] = float(iou.mean())
            if name == "val_jitter":
                figures["val_score_error"] = float((score - iou).abs().mean())
        return figures

    def _measure(
        self, model: Segmenter, table: TextTable, sigma: float, text: bool, spatial: bool
    ) -> tuple[Tensor, Tensor]:
        ious, scores = [], []
        rng = np.random.default_rng(2)
        device = self.pool.device
        for start in range(0, len(self.pool), _BATCH):
            rows = np.arange(start, min(start + _BATCH, len(self.pool)))
            given = [[_only(c, text, spatial) for c in self.choices[r]] for r in rows]
            noise = np.full((len(rows), len(given[0])), sigma, np.float32)
            prompts, targets = build(self.pool, rows, given, noise, table, rng)
            with autocast(device):
                logits, score = model(pixels(self.pool, torch.from_numpy(rows).to(device), model), prompts)
            size = targets.labels.shape[-1]
            logits = F.interpolate(logits.float(), (size, size), mode="bilinear", align_corners=False)
            # Prompts that fill a scene up have no text, and plurals alone do not say which object.
            counted = [[c.unique if not spatial else bool(c.text) for c in self.choices[r]] for r in rows]
            keep = torch.tensor(counted, device=device)
            ious.append(mask_iou(logits > 0, targets.masks())[keep])
            scores.append(score[keep])
        return torch.cat(ious), torch.cat(scores)


_BATCH = 16


def _only(choice: Choice, text: bool, spatial: bool) -> Choice:
    return replace(choice, text=choice.text if text else "", boxed=choice.boxed if spatial else -1)
