"""The segmenter with the kernels and without them: whether it draws the same masks, and how fast.

``TRITON_INTERPRET=1 python -m benchmarks.kernel_masks --seed 7`` draws the objects of a scene on a CPU, the
kernels in Triton's interpreter, and prints one JSON object for each dtype.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.interpreter_rounding import round_to_nearest
from benchmarks.kernel_cases import DTYPES
from kernels.op import using
from ppcr.checkpoint import SHIPPED
from ppcr.data.graph import sample_scene
from ppcr.data.render import render
from ppcr.model.prompt_encoder import EncodedPrompts, Prompts
from ppcr.model.segmenter import Segmenter, normalize

LEAST_IOU = 0.999
"""What masks with and without the kernels must agree in."""


class Drawing:
    """Prompts of one scene for the shipped segmenter: a true box and point for each object, and no text."""

    def __init__(self, seed: int, device: str, dtype: torch.dtype, most: int) -> None:
        self.segmenter = Segmenter.load(SHIPPED / "segmenter").to(device)
        config = self.segmenter.config
        # As in the product: boxes, points and text are read in fp32 always.
        for part in (self.segmenter.image_encoder, self.segmenter.mask_decoder):
            part.to(dtype)
        scene = render([sample_scene("test", seed % 1_000_000)], size=config.image_size, device=device)
        seen = scene.masks[0].flatten(1).any(1).nonzero().flatten()[:most]
        self.truth = scene.masks[0, seen]
        count = len(seen)
        text = torch.zeros(1, count, 1, config.text_dim, device=device)
        unread = torch.zeros(1, count, 1, device=device, dtype=torch.bool)
        valid = torch.ones(1, count, device=device)
        self.prompts = Prompts(scene.boxes[:, seen], scene.points[:, seen], valid, text, unread)
        self.dtype = dtype
        with torch.no_grad():
            self.features = self.segmenter.encode(normalize(scene.image, config).to(dtype))

    @torch.no_grad()
    def masks(self) -> Tensor:
        """bool[objects, S/2, S/2]"""
        encoder = self.segmenter.prompt_encoder
        encoded = EncodedPrompts(*(t.to(self.dtype) for t in encoder(self.prompts)))
        return self.segmenter.mask_decoder(self.features, encoded, encoder.cell_positions)[0][0] > 0


def agreement(seed: int, dtype: str, device: str = "cpu", most: int = 2) -> dict[str, Any]:
    """``iou``: the least of all objects' masks with kernels and without; ``truth_iou``: the least of those
    with kernels and the true masks: of masks that are all empty, the first would say nothing."""
    drawing = Drawing(seed, device, DTYPES[dtype], most)
    with using("off"):
        plain = drawing.masks()
    with using("op"), kernels_run(device):
        fused = drawing.masks()
    side = plain.shape[-1]
    truth = torch.nn.functional.interpolate(drawing.truth.float()[None], (side, side), mode="area")[0] > 0.5
    return {
        "dtype": dtype,
        "objects": len(plain),
        "iou": _least_iou(plain, fused),
        "truth_iou": _least_iou(truth, fused),
    }


def kernels_run(device: str) -> AbstractContextManager[Any]:
    """Within it the ops run the kernels on ``device``: on a CPU that is up to the interpreter."""
    return mock.patch("kernels.op.runs_on", lambda x: True) if device == "cpu" else nullcontext()


def _least_iou(a: Tensor, b: Tensor) -> float:
    both, either = ((x.flatten(1).sum(1).float()) for x in (a & b, a | b))
    return float(torch.where(either > 0, both / either.clamp(min=1), torch.ones_like(either)).min())


def main(argv: Sequence[str] | None = None) -> int:
    """Print one JSON object for each dtype; 1 when masks do not agree."""
    parser = argparse.ArgumentParser(description="The segmenter's masks with the kernels and without.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "fp16"])
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    round_to_nearest()
    good = True
    for dtype in arguments.dtypes:
        row = agreement(arguments.seed, dtype)
        good = good and row["iou"] >= LEAST_IOU
        print(json.dumps(row), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
