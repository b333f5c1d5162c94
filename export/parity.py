"""The gate: every precision of a bundle, as the runtime runs it, against the torch reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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


def make_cases(reference: ReferencePipeline, count: int, progress: Progress) -> list[Case]:
    """Answer the first ``count`` scenes of the validation split with the reference, reporting each."""
    cases = []
    for image, example in held_out(count):
        expression = example.expressions[0].text
        cases.append(Case(image, expression, reference.segment(image, expression)))
        progress("reference")
    return cases


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


def measure(bundle: Path, precision: str, cases: Sequence[Case], progress: Progress) -> Parity:
    """Run ``cases`` through onnxruntime at ``precision`` and compare each with its reference."""
    with Pipeline.load(bundle, precision=precision, engine="onnxruntime") as pipeline:
        return compare(pipeline, cases, progress)


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
