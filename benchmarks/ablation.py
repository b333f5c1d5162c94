"""The four ways to prompt that the ablation compares, on the same examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.systems import Answer, BoolMask, View
from ppcr.evaluation.metrics import Summary
from ppcr.prompts import SemanticPrompt

BOTH = "both prompts"
UNINFORMATIVE = SemanticPrompt("object", count=1)
"""What stage 1 is made to say where the MLLM is asked for the box directly."""


@dataclass(frozen=True)
class Variant:
    """One way to prompt.

    Attributes:
        explanation: in one line.
        draw: view, expression, and the method's own answer to it -> whole mask bool [H, W].
        may_decline: it can answer "none", by stage 1.
    """

    explanation: str
    draw: Callable[[View, str, Answer], BoolMask]
    may_decline: bool = True

    def run(self, view: View, expression: str, answer: Answer) -> tuple[bool, BoolMask]:
        """Whether "none" was answered, and the whole mask."""
        if self.may_decline and answer.semantic.is_none:
            return True, np.zeros_like(answer.mask)
        return False, self.draw(view, expression, answer)


def _single_turn(view: View, expression: str, answer: Answer) -> BoolMask:
    return view.draw(None, view.answer(expression, UNINFORMATIVE).spatial)


VARIANTS: dict[str, Variant] = {
    BOTH: Variant(
        "the method: semantic prompt, then boxes; the segmenter reads both",
        lambda view, expression, answer: answer.mask,
    ),
    "without semantic": Variant(
        "the same boxes; the segmenter reads no text",
        lambda view, expression, answer: view.draw(None, answer.spatial),
    ),
    "without spatial": Variant(
        "the same text; the segmenter gets no box and no point, and draws one mask",
        lambda view, expression, answer: view.draw(answer.semantic, None),
    ),
    "single-turn box": Variant(
        f"stage 1 replaced by {UNINFORMATIVE.text!r}: one box at once; the segmenter reads no text",
        _single_turn,
        may_decline=False,
    ),
}


def best(figures: Mapping[str, Summary]) -> str:
    """The variant with the highest mIoU; several, separated by commas, where they are exactly equal."""
    highest = max(one.miou for one in figures.values())
    return ", ".join(name for name, one in figures.items() if one.miou == highest)
