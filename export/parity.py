"""The gate: every precision of a bundle, as the runtime runs it, against the torch reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ppcr import masks
from ppcr.data.graph import Split
from ppcr.data.render import render
from ppcr.data.scenes import SceneExample, scene_examples
from ppcr.errors import ParityError
from ppcr.manifest import Parity
from ppcr.model.reference import ReferencePipeline, ReferenceResult
from runtime.pipeline import Pipeline
from runtime.result import Result

IMAGE_SIZE = 256
SPLIT: Split = "val"
LARGER = 4
"""What is too close to a gate to tell is judged over so many times the scenes."""
_ENOUGH = 100
_BATCH = 8

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Gate:
    """Least share of identical token sequences, and least mean mask IoU, engine against reference."""

    identical_tokens: float
    mean_iou: float


# int4 is rounded as it comes, with no data to correct it: answers may differ, masks must not be others.
GATES = {
    "fp32": Gate(0.99, 0.995),
    "fp16": Gate(0.95, 0.98),
    "bf16": Gate(0.95, 0.98),
    "fp8": Gate(0.95, 0.98),
    "int8": Gate(0.97, 0.98),
    "int4": Gate(0.0, 0.8),
}


@dataclass(frozen=True)
class Case:
    """A held-out scene: image uint8 [H, W, 3], expression, and the reference's answer."""

    image: npt.NDArray[np.uint8]
    expression: str
    reference: ReferenceResult


class Cases:
    """The first scenes of the validation split, which the reference answers when they are asked for.

    Args:
        count: how many are looked at, unless these cannot tell. progress: told of each answer.
    """

    def __init__(self, reference: ReferencePipeline, count: int, progress: Progress) -> None:
        self.count, self._reference, self._progress = count, reference, progress
        self._scenes = held_out(LARGER * count)
        self._answered: list[Case] = []

    def first(self, count: int) -> list[Case]:
        """The first ``count``, at most `LARGER` times the usual number."""
        for image, example in islice(self._scenes, max(0, count - len(self._answered))):
            expression = example.expressions[0].text
            answer = self._reference.segment(image, expression)
            self._answered.append(Case(image, expression, answer))
            self._progress("reference")
        return self._answered[:count]


def held_out(count: int) -> Iterator[tuple[npt.NDArray[np.uint8], SceneExample]]:
    """The first ``count`` scenes of the validation split, as `scenes_of`."""
    return scenes_of(SPLIT, count)


def scenes_of(split: Split, count: int) -> Iterator[tuple[npt.NDArray[np.uint8], SceneExample]]:
    """The first ``count`` scenes of a split as images uint8 [256, 256, 3]."""
    for start in range(0, count, _BATCH):
        examples = list(scene_examples(split, range(start, min(start + _BATCH, count))))
        images = render([example.graph for example in examples], IMAGE_SIZE).image
        pixels = (images * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
        yield from zip(pixels, examples, strict=True)


def measure(bundle: Path, precision: str, cases: Cases, progress: Progress) -> Parity:
    """Run ``cases`` through onnxruntime at ``precision`` and judge it."""
    with Pipeline.load(bundle, precision=precision, engine="onnxruntime") as pipeline:
        return judge(pipeline, cases, progress)


def judge(pipeline: Pipeline, cases: Cases, progress: Progress) -> Parity:
    """The figures of an engine over ``cases``; over more of them where the usual number cannot tell.

    What is found over more counts, whether the gate was passed before or not.
    """
    found = compare(pipeline, cases.first(cases.count), progress)
    if is_close(found, str(pipeline.engine["precision"])):
        return compare(pipeline, cases.first(LARGER * cases.count), progress)
    return found


def is_close(parity: Parity, precision: str) -> bool:
    """Whether the share of identical answers is less than two standard errors from the gate, on either side.

    Of an engine that gives 96 of 100 answers as the reference does, 128 scenes see less than 95 in one case
    of four. From few scenes nothing can be said at all, and those who ask for few want a quick answer.
    """
    gate, share = GATES[precision], parity.identical_tokens
    if parity.scenes < _ENOUGH or parity.mean_iou < gate.mean_iou:
        return False
    return abs(share - gate.identical_tokens) < 2 * math.sqrt(share * (1 - share) / parity.scenes)


def compare(pipeline: Pipeline, cases: Sequence[Case], progress: Progress) -> Parity:
    """Run ``cases`` through an engine and compare each with its reference, by the gate of its precision."""
    identical, overlaps = [], []
    precision = str(pipeline.engine["precision"])
    for case in cases:
        result = pipeline.open(case.image).segment(case.expression)
        identical.append(same_tokens(result, case.reference))
        overlaps.append(masks.iou(result.mask, case.reference.mask))
        progress(precision)
    gate = GATES[precision]
    share, mean = float(np.mean(identical)), float(np.mean(overlaps))
    passed = share >= gate.identical_tokens and mean >= gate.mean_iou
    return Parity(len(cases), round(share, 5), round(mean, 5), round(float(np.min(overlaps)), 5), passed)


def same_tokens(result: Result, reference: ReferenceResult) -> bool:
    """Whether both stages gave the same answer: the semantic prompt's text, and every box and point."""
    return result.semantic.text == reference.semantic.text and np.array_equal(
        result.spatial.locations, reference.spatial.locations
    )


def require(figures: dict[str, Parity]) -> None:
    """Raise ParityError, naming the precisions and their figures, unless every gate was passed."""
    failed = {precision: parity for precision, parity in figures.items() if not parity.passed}
    if not failed:
        return
    told = "; ".join(f"{name}: {shortfall(parity, name)}" for name, parity in failed.items())
    cure = "leave out that precision with --precision, or ship it all the same with --allow-parity-failure"
    raise ParityError(f"the export disagrees with the torch reference, no bundle written. {told}. {cure}")


def shortfall(parity: Parity, precision: str) -> str:
    """Figures beside what the gate of ``precision`` asks for."""
    gate = GATES[precision]
    return (
        f"{parity.identical_tokens:.1%} identical token sequences (gate {gate.identical_tokens:.1%}), "
        f"mean mask IoU {parity.mean_iou:.4f} (gate {gate.mean_iou})"
    )
