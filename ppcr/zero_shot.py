"""Both stages with a pretrained Qwen2.5-VL or Qwen3-VL, as it is: instructions, and what it may answer.

Stage 1 is asked for the same four fields as a trained model writes, so that its answer can be read and edited
alike. Stage 2 is asked for boxes in the form these models learned, a JSON list of ``bbox_2d``, with numbers
in the family's own convention (`ppcr.boxes`): what is fixed in it is forced, only the digits are the model's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from ppcr import boxes as frames
from ppcr.config import PPCRConfig
from ppcr.constraint import Constraint, Literal, Number, Segment
from ppcr.errors import BundleError
from ppcr.prompts import (
    ANY,
    COUNT_WORDS,
    IM_END,
    IM_START,
    VISION_END,
    VISION_START,
    Conversation,
    SpatialPrompt,
)
from ppcr.tokenizer import PromptTokenizer, read_tokenizer

CONVENTIONS = {"qwen2_5_vl": "pixels", "qwen3_vl": "thousandths"}
"""How each family writes boxes."""
MAX_DIGITS = 4

_SYSTEM = {"qwen2_5_vl": "You are a helpful assistant."}
_FIELDS = (
    "Say what the phrase at the end refers to in this picture, as four fields on one line with semicolons "
    "between them: category; attributes; relation; count.\n"
    "category: what kind of thing it is, one or two words.\n"
    f"attributes: how it looks, such as its colour or size, or {ANY}.\n"
    f"relation: where it is or what it does, or {ANY}.\n"
    f"count: how many things in the picture fit the phrase, as a word: {', '.join(COUNT_WORDS[:-1])} or "
    f"{COUNT_WORDS[-1]}. Write {COUNT_WORDS[0]} if nothing in the picture fits.\n"
    f"Example: dog; small brown; left of the sofa; {COUNT_WORDS[1]}\n"
    "Phrase:\n"
)
# Short: it comes after stage 1's answer, so that every expression has to read it anew.
_BOXES = "Detect each and report its bbox_2d coordinates in JSON format."
_OPEN, _BETWEEN, _CLOSE = '```json\n[\n\t{"bbox_2d": [', ']},\n\t{"bbox_2d": [', "]}\n]\n```"
_BOX = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")


@dataclass(frozen=True)
class ZeroShotTexts:
    """The fixed texts around image, expression and answers, in the chat form of ``family``.

    All instructions stand before the expression: what every expression of an image shares is read once.
    """

    family: str = "qwen2_5_vl"

    @property
    def before_image(self) -> str:
        """The family's own system turn, if it has one, and the user turn's opening."""
        system = _SYSTEM.get(self.family)
        opening = f"{IM_START}system\n{system}{IM_END}\n" if system else ""
        return f"{opening}{IM_START}user\n{VISION_START}"

    @property
    def after_image(self) -> str:
        """The instructions of stage 1."""
        return VISION_END + _FIELDS

    @property
    def after_expression(self) -> str:
        """The opening of stage 1's answer."""
        return f"{IM_END}\n{IM_START}assistant\n"

    @property
    def between_stages(self) -> str:
        """The request of stage 2, and the opening of its answer."""
        return f"{IM_END}\n{IM_START}user\n{_BOXES}{IM_END}\n{IM_START}assistant\n"


class ZeroShotTokenizer(PromptTokenizer):
    """Token ids of the conversation with a pretrained model, and what each stage may answer.

    Args:
        tokenizer: the model's own; each digit must be a token, as in all Qwen tokenizers.
        family: "qwen2_5_vl" or "qwen3_vl". convention: how it writes boxes, one of `ppcr.boxes.WRITTEN`.
    """

    def __init__(self, tokenizer: Tokenizer, family: str, convention: str) -> None:
        self.tokenizer, self.convention = tokenizer, convention
        self.conversation = ZeroShotTexts(family)
        self.digits = tuple(self._id(str(digit)) for digit in range(10))
        if self.encode("0123456789") != list(self.digits):
            raise BundleError("this tokenizer.json joins digits: use the one of a Qwen2.5-VL or Qwen3-VL")

    @property
    def _locations(self) -> range:
        return range(0)

    def spatial_constraint(self, count: int) -> Constraint:
        """A JSON list of ``count`` boxes: everything forced but the digits."""
        return self._constraints[count]

    @cached_property
    def _constraints(self) -> list[Constraint]:
        return [self._boxes(count) for count in range(len(COUNT_WORDS))]

    def _boxes(self, count: int) -> Constraint:
        # Cut from the ids of a whole answer, so that what is forced is what the model would have written.
        ids = self.encode(written([[1, 1, 1, 1]] * count))
        places = [place for place, token in enumerate(ids) if token == self.digits[1]]
        if len(places) != 4 * count:
            raise BundleError("this tokenizer.json hides the numbers of a box: use the one of a Qwen model")
        segments: list[Segment] = []
        start = 0
        for place in places:
            segments += [Literal(tuple(ids[start:place]))] if place > start else []
            segments.append(Number(self.digits, ids[place + 1], MAX_DIGITS))
            start = place + 2
        segments += [Literal(tuple(ids[start:]))] if start < len(ids) else []
        return Constraint(tuple(segments))

    def spatial(self, ids: Sequence[int], size: tuple[int, int] = (1, 1)) -> SpatialPrompt:
        """The spatial prompt of an answer: its boxes made usable, their centres as points.

        size: height and width in pixels of the image as the model saw it.
        """
        found = [[int(number) for number in match] for match in _BOX.findall(self.decode(ids))]
        if not found:
            return SpatialPrompt.empty()
        unit = frames.repair(frames.from_written(found, self.convention, size))
        return SpatialPrompt(unit, (unit[:, :2] + unit[:, 2:]) / np.float32(2))

    def spatial_ids(self, prompt: SpatialPrompt, size: tuple[int, int] = (1, 1)) -> list[int]:
        """What the model would have written to say ``prompt``; ``size`` as in `spatial`."""
        return self.encode(written(frames.to_written(prompt.boxes, self.convention, size).tolist()))


def written(boxes: Sequence[Sequence[int]]) -> str:
    """Boxes of four whole numbers each as these models write them."""
    return _OPEN + _BETWEEN.join(", ".join(str(number) for number in box) for box in boxes) + _CLOSE


def tokenizer_of(config: PPCRConfig, path: Path) -> PromptTokenizer:
    """The tokenizer of a checkpoint or bundle whose ``tokenizer.json`` is ``path``.

    Raises:
        BundleError: missing, unreadable, or not of this kind of model.
    """
    if config.box_convention in frames.WRITTEN:
        return ZeroShotTokenizer(read_tokenizer(path), config.mllm.family, config.box_convention)
    return PromptTokenizer.load(path, Conversation(config.mllm.ruler), config.mllm.location_step)
