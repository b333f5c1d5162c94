"""Photographs with expressions, boxes and masks: a folder of ``triples.json`` and ``images/``.

Each entry of triples.json: ``image`` (a file below images/), ``expression``, ``box_xyxy`` in pixels and
``mask_rle`` as COCO has it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from benchmarks.systems import System
from ppcr import boxes, images, masks
from ppcr.errors import UsageError
from ppcr.evaluation.metrics import Case, Protocol, compare, stretch
from ppcr.prompts import SpatialPrompt

TRIPLES, IMAGES = "triples.json", "images"
GIVEN = ("spatial",)
# COCO's bounds of an object's area, in pixels.
_SMALL, _LARGE = 32**2, 96**2


@dataclass(frozen=True)
class Photo:
    """One expression about one photograph.

    Attributes:
        path: of the image file. box: f32 [4] xyxy in its pixels. truth: COCO RLE of its mask.
    """

    path: Path
    expression: str
    box: npt.NDArray[np.float32]
    truth: masks.RLE


def read(folder: Path) -> list[Photo]:
    """The entries of ``folder``, those of one image side by side.

    Raises:
        UsageError: triples.json is missing or malformed, or names an image that is not there.
    """
    path = folder / TRIPLES
    try:
        found = [_photo(folder, entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        raise UsageError(f"{folder} holds no {TRIPLES}: give a folder with {TRIPLES} and {IMAGES}/") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"cannot read {path}: {type(error).__name__}: {error}") from None
    if not found:
        raise UsageError(f"{path} is empty")
    missing = next((photo.path for photo in found if not photo.path.is_file()), None)
    if missing is not None:
        raise UsageError(f"{path} names {missing.name}, which is not in {IMAGES}/")
    return sorted(found, key=lambda photo: photo.path)


def evaluate(system: System, photos: Sequence[Photo], protocol: Protocol, *, given: str | None) -> list[Case]:
    """One case per photo; ``given`` "spatial": the true box stands for stages 1 and 2."""
    cases, view, seen = [], None, None
    for photo in tqdm(photos, desc="photos", unit="photo", disable=None, leave=False):
        if view is None or photo.path != seen:
            image = images.load_image(photo.path)
            view, seen = system.look(image), photo.path
        truth = masks.decode_rle(photo.truth)
        if truth.shape != image.shape[:2]:
            raise UsageError(f"the mask of {photo.path.name} has another size than the image")
        if given == "spatial":
            unit = boxes.to_unit(photo.box, image.shape[1], image.shape[0])[None]
            mask = view.draw(None, SpatialPrompt(unit, (unit[:, :2] + unit[:, 2:]) / 2))
            said_none = False
        else:
            answer = view.answer(photo.expression)
            mask, said_none = answer.mask, answer.semantic.is_none
        drawn, kind = stretch(mask, protocol.side), _size(int(truth.sum()))
        cases.append(
            compare(drawn, stretch(truth, protocol.side), protocol=protocol, said_none=said_none, kind=kind)
        )
    return cases


def _photo(folder: Path, entry: dict[str, Any]) -> Photo:
    box = np.asarray(entry["box_xyxy"], np.float32)
    rle = entry["mask_rle"]
    if box.shape != (4,) or not np.isfinite(box).all():
        raise ValueError(f"box {entry['box_xyxy']!r} is not four numbers")
    truth = masks.RLE(size=[int(side) for side in rle["size"]], counts=str(rle["counts"]))
    name = Path(str(entry["image"])).name
    return Photo(folder / IMAGES / name, str(entry["expression"]), box, truth)


def _size(area: int) -> str:
    if area < _SMALL:
        return "small object"
    return "large object" if area > _LARGE else "medium object"
