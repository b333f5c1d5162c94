"""Mask metrics under named protocols; figures of different protocols are never comparable.

mIoU (elsewhere gIoU) is the mean over expressions of the IoU of whole masks, all instances of an expression
taken together; oIoU (elsewhere cIoU) is the sum of intersections over the sum of unions; P@X is the share of
expressions with an IoU beyond X. Needs numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Protocol:
    """How one mask is compared with the truth, and what counts as precise.

    Attributes:
        name: as printed beside the figures.
        side: masks are compared at ``side`` x ``side`` pixels; None: at the original image's size.
        threshold: a logit above it is foreground.
        empty_iou: IoU where neither the prediction nor the truth has a pixel.
        strict: P@X asks for an IoU above X; otherwise X itself suffices.
        least_pixels: a prediction of fewer pixels counts as empty.
        precision_of_targets: P@X leaves out expressions without a target.
    """

    name: str
    side: int | None = None
    threshold: float = 0.0
    empty_iou: float = 1.0
    strict: bool = True
    least_pixels: int = 0
    precision_of_targets: bool = False

    def __str__(self) -> str:
        size = "the original size" if self.side is None else f"{self.side}x{self.side}"
        parts = [f"at {size}", f"logit > {self.threshold:.3g}", f"empty against empty = {self.empty_iou:g}"]
        parts.append(f"P@X: IoU {'>' if self.strict else '>='} X")
        if self.least_pixels:
            parts.append(f"under {self.least_pixels} pixels = empty")
        if self.precision_of_targets:
            parts.append("P@X over expressions with targets")
        return f"{self.name} ({', '.join(parts)})"


DEFAULT = Protocol("default")
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        DEFAULT,
        Protocol("lavt", side=480, empty_iou=0.0, strict=False),
        # CRIS cuts probabilities at 0.35.
        Protocol("cris", threshold=float(np.log(0.35 / 0.65)), empty_iou=0.0),
        Protocol("lisa"),
        Protocol("ssp_sam", side=512, least_pixels=50),
        Protocol("rela", strict=False, precision_of_targets=True),
    )
}
"""By name: the protocols that published figures were made with (LISA's is also EVF-SAM's)."""


@dataclass(frozen=True)
class Case:
    """One expression, compared: pixels in both masks and in either; whether it has a target, and whether the
    answer was that it has none; the kind of expression."""

    intersection: int
    union: int
    has_target: bool
    said_none: bool
    kind: str = ""

    def iou(self, protocol: Protocol = DEFAULT) -> float:
        """IoU in 0..1."""
        return self.intersection / self.union if self.union else protocol.empty_iou


def compare(
    prediction: npt.NDArray[Any],
    truth: npt.NDArray[Any],
    *,
    protocol: Protocol = DEFAULT,
    said_none: bool | None = None,
    kind: str = "",
) -> Case:
    """Hold the whole mask of one expression to the truth.

    Args:
        prediction: bool [H, W], or logits f32 [H, W] that the protocol's threshold cuts.
        truth: [H, W], foreground where above 0 (sums of overlapping polygons may exceed 1).
        said_none: the answer was "none"; default: the prediction is empty.

    Raises:
        ValueError: of different sizes, or not of the size that the protocol asks for (see `stretch`).
    """
    wanted = truth.shape if protocol.side is None else (protocol.side, protocol.side)
    if prediction.ndim != 2 or not prediction.shape == truth.shape == wanted:
        told = f"masks of shapes {prediction.shape} and {truth.shape}"
        raise ValueError(f"{told}, protocol {protocol.name} compares masks of shape {wanted}")
    foreground = prediction if prediction.dtype == np.bool_ else prediction > protocol.threshold
    target = truth > 0
    if said_none or np.count_nonzero(foreground) < protocol.least_pixels:
        foreground = np.zeros_like(target)
    both, either = np.count_nonzero(foreground & target), np.count_nonzero(foreground | target)
    none = not foreground.any() if said_none is None else said_none
    return Case(int(both), int(either), bool(target.any()), bool(none), kind)


def stretch(mask: npt.NDArray[Any], side: int | None) -> npt.NDArray[Any]:
    """[H, W] to [side, side], each pixel taken from its nearest; as it is for None."""
    if side is None:
        return mask
    rows, columns = (((np.arange(side) + 0.5) * n / side).astype(np.int64) for n in mask.shape)
    return mask[rows[:, None], columns]


@dataclass(frozen=True)
class Summary:
    """Figures over n expressions; shares in 0..1.

    Attributes:
        protocol: its name.
        precision: X -> P@X.
        with_target: how many of n have a target.
        none_recall: share of expressions without a target that were answered "none"; None where all have one.
        none_false_rate: share of expressions with a target that were answered "none"; None likewise.
    """

    protocol: str
    n: int
    miou: float
    oiou: float
    precision: dict[float, float]
    with_target: int
    none_recall: float | None
    none_false_rate: float | None

    def to_json(self) -> dict[str, Any]:
        """JSON values, rounded to five digits."""
        shares = {f"precision_at_{x}": value for x, value in self.precision.items()}
        figures = {"miou": self.miou, "oiou": self.oiou, **shares}
        nones = {"none_recall": self.none_recall, "none_false_rate": self.none_false_rate}
        rounded = {
            name: None if value is None else round(value, 5) for name, value in {**figures, **nones}.items()
        }
        return {"protocol": self.protocol, **rounded, "n": self.n, "n_with_target": self.with_target}


def summarise(cases: Sequence[Case], protocol: Protocol = DEFAULT) -> Summary:
    """Figures of ``cases``, all made under ``protocol``. Raises ValueError when there is no case."""
    if not cases:
        raise ValueError("no cases: there is nothing to summarise")
    ious = np.array([case.iou(protocol) for case in cases])
    targets = np.array([case.has_target for case in cases])
    nones = np.array([case.said_none for case in cases])
    judged = ious[targets] if protocol.precision_of_targets else ious
    union = sum(case.union for case in cases)
    return Summary(
        protocol=protocol.name,
        n=len(cases),
        miou=float(ious.mean()),
        oiou=sum(case.intersection for case in cases) / union if union else protocol.empty_iou,
        precision={x: _share(judged > x if protocol.strict else judged >= x) or 0.0 for x in PRECISION_AT},
        with_target=int(targets.sum()),
        none_recall=_share(nones[~targets]),
        none_false_rate=_share(nones[targets]),
    )


def by_kind(cases: Iterable[Case], protocol: Protocol = DEFAULT) -> dict[str, Summary]:
    """Figures of each kind of expression, the kinds in alphabetical order."""
    kinds: dict[str, list[Case]] = {}
    for case in cases:
        kinds.setdefault(case.kind, []).append(case)
    return {kind: summarise(kinds[kind], protocol) for kind in sorted(kinds)}


def _share(hits: npt.NDArray[np.bool_]) -> float | None:
    return float(hits.mean()) if hits.size else None
