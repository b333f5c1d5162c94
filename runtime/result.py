"""What one expression gave: prompts, masks, scores and costs; as JSON and as files."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ppcr import __version__, boxes, masks
from ppcr.errors import PPCRError
from ppcr.files import ensured_directory, output_error
from ppcr.prompts import SemanticPrompt, SpatialPrompt
from runtime.timing import Timing

EngineFacts = dict[str, str | int | list[str]]

OVERLAY, RESULT = "overlay.png", "result.json"
FORMAT = 1


@dataclass(frozen=True)
class Costs:
    """What the MLLM did.

    Attributes:
        tokens: answered. forward_calls: blocks run, those that read for other expressions as well included.
        reused_tokens: that its cache already held at each turn.
        drafted_tokens: guessed from the words and checked; accepted_tokens: those of them that were answered.
    """

    tokens: int = 0
    forward_calls: int = 0
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Result:
    """The answer to one expression.

    Attributes:
        expression: as it was given.
        image: uint8 [H, W, 3] RGB, the original.
        semantic: what is looked for. spatial: where it is, in 0..1 (see ``boxes`` for pixels).
        instances: bool [K, H, W], one mask per box, in the order of the boxes; K = 0 for "none".
        scores: f32 [K], the segmenter's own estimate of each mask's IoU, 0..1.
        timings: seconds per stage (``runtime.timing.STAGES``) and "total".
        costs: of the MLLM.
        given: which stages were given instead of computed: "semantic", "boxes".
        engine: bundle, precision, engine, device and threads that were used; the engine's parity verdict;
            and why faster engines were passed over, a line each.
    """

    expression: str
    image: npt.NDArray[np.uint8]
    semantic: SemanticPrompt
    spatial: SpatialPrompt
    instances: npt.NDArray[np.bool_]
    scores: npt.NDArray[np.float32]
    timings: dict[str, Timing]
    costs: Costs
    given: tuple[str, ...]
    engine: EngineFacts

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the original image."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def boxes(self) -> npt.NDArray[np.float32]:
        """f32 [K, 4] xyxy in pixels of the original image."""
        return boxes.to_pixels(boxes.repair(self.spatial.boxes), self.size[1], self.size[0])

    @property
    def points(self) -> npt.NDArray[np.float32]:
        """f32 [K, 2] xy in pixels of the original image."""
        return boxes.to_pixels(self.spatial.points, self.size[1], self.size[0])

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """bool [H, W]: the union of all instances; all False for "none"."""
        return masks.union(self.instances)

    @property
    def is_none(self) -> bool:
        """True when the answer is that nothing in the image fits."""
        return len(self.instances) == 0

    def to_json(self) -> dict[str, Any]:
        """JSON values: boxes and points in pixels, masks as COCO RLE, seconds per stage."""
        semantic = self.semantic
        return {
            "format": FORMAT,
            "ppcr": __version__,
            "engine": self.engine,
            "expression": self.expression,
            "image": {"height": self.size[0], "width": self.size[1]},
            "none": self.is_none,
            "given": list(self.given),
            "semantic": {
                "text": semantic.text,
                "category": semantic.category,
                "attributes": semantic.attributes,
                "relation": semantic.relation,
                "count": semantic.count,
            },
            "spatial": {"boxes": _rounded(self.boxes), "points": _rounded(self.points)},
            "masks": [masks.encode_rle(mask) for mask in self.instances],
            "union": masks.encode_rle(self.mask),
            "scores": [round(float(score), 4) for score in self.scores],
            "timings": {
                "stages": {
                    name: {"wall_s": round(t.wall, 6), "device_s": round(t.device, 6)}
                    for name, t in self.timings.items()
                },
                "tokens": self.costs.tokens,
                "forward_calls": self.costs.forward_calls,
                "reused_tokens": self.costs.reused_tokens,
            },
        }

    def overlay(self) -> npt.NDArray[np.uint8]:
        """uint8 RGB picture: masks, boxes with their scores, and both prompts as a caption."""
        labels = [f"{index} {score:.2f}" for index, score in enumerate(self.scores)]
        caption = f"{self.expression}\n{self.semantic.text}"
        return masks.overlay(self.image, self.instances, self.boxes, labels, caption=caption)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write overlay.png, mask_0.png, … and result.json into ``folder``; return the overlay's path.

        The folder is made where missing; other files in it stay, those of an earlier result are replaced. All
        files are written beside first and then renamed into place, so that an error leaves none of them.

        Raises:
            OutputError: the folder cannot be written, or the disk is full.
        """
        with ensured_directory(folder) as target:
            part: str | None = None
            try:
                part = tempfile.mkdtemp(prefix=".ppcr-", dir=target)
                names = self._write(Path(part))
                for stale in target.glob("mask_*.png"):
                    if stale.name not in names and stale.stem.removeprefix("mask_").isdecimal():
                        stale.unlink()
                for name in names:
                    os.replace(Path(part) / name, target / name)
            except PPCRError as error:
                # It names a file of the hidden folder, which the user has never heard of.
                raise output_error(target, error.__cause__ or error) from error
            except OSError as error:
                raise output_error(target, error) from error
            finally:
                if part is not None:
                    shutil.rmtree(part, ignore_errors=True)
        return target / OVERLAY

    def _write(self, part: Path) -> list[str]:
        names = [f"mask_{index}.png" for index in range(len(self.instances))]
        for name, mask in zip(names, self.instances, strict=True):
            masks.save_png(mask, part / name)
        masks.save_png(self.overlay(), part / OVERLAY)
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        (part / RESULT).write_text(text, encoding="utf-8", errors="backslashreplace")
        # The JSON last: where it lies, the pictures that it speaks of lie too.
        return [*names, OVERLAY, RESULT]


def _rounded(values: npt.NDArray[np.float32]) -> list[list[float]]:
    return [[round(float(v), 2) for v in row] for row in values]
