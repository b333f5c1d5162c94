"""The two prompts of PPCR and the conversation that produces them.

Stage 1 answers with the *Semantic Segmentation Prompt*, stage 2 goes on in the same conversation with the
*Spatial Segmentation Prompt*. Both are plain text of the MLLM's vocabulary, so that any engine that
returns text can serve them and a person can read and edit them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppcr.boxes import LOCATION_BINS, from_location, iou, to_location
from ppcr.errors import ExpressionError

MAX_TARGETS = 6
LOCATIONS_PER_INSTANCE = 6
ANY = "any"
SEPARATOR = ";"
SAME = 0.9
"""Boxes of one answer that overlap by this IoU or more tell the same object; two objects hardly ever do."""
COUNT_WORDS = ("none", "one", "two", "three", "four", "five", "six")

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)

SPATIAL_REQUEST = "locate"
"""What the user turn of stage 2 says."""


def location_token(index: int) -> str:
    """Text of location token ``index`` in 0..999."""
    return f"<|loc_{index:03d}|>"


@dataclass(frozen=True)
class SemanticPrompt:
    """What the target is.

    Attributes:
        category: shape or object noun; ``"object"`` where the expression names none.
        attributes: canonical attributes ("large red metal", "not blue"); empty for none.
        relation: canonical relation to landmarks or an order ("left of green cube", "leftmost",
            "second from left"); empty for none.
        count: number of targets, 0 (no target) to 6.
    """

    category: str
    attributes: str = ""
    relation: str = ""
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.count <= MAX_TARGETS:
            raise ExpressionError(f"a semantic prompt counts 0 to {MAX_TARGETS} targets, not {self.count}")
        for value in (self.category, self.attributes, self.relation):
            if SEPARATOR in value:
                raise ExpressionError(f"no field of a semantic prompt can contain {SEPARATOR!r}: {value!r}")

    @property
    def text(self) -> str:
        """``category; attributes; relation; count`` with ``any`` for an empty field."""
        free = (self.category or "object", self.attributes or ANY, self.relation or ANY)
        return f"{SEPARATOR} ".join((*free, COUNT_WORDS[self.count]))

    @property
    def is_none(self) -> bool:
        """True when the answer is that nothing in the image fits the expression."""
        return self.count == 0

    @classmethod
    def parse(cls, text: str) -> SemanticPrompt:
        """Read ``category; attributes; relation; count`` (count as a word or a number).

        The text is cleaned as an expression is (``clean_expression``): what a person writes here reaches the
        model too.

        Raises:
            ExpressionError: the text is not of that form; the message shows the form.
        """
        text = clean_expression(text, what="semantic prompt")
        fields = [" ".join(part.split()) for part in text.split(SEPARATOR)]
        if len(fields) != 4:
            raise ExpressionError(f"cannot read the semantic prompt {text[:80]!r}: {_FORM}")
        word = fields[3]
        if word in COUNT_WORDS:
            count = COUNT_WORDS.index(word)
        elif re.fullmatch(r"[0-9]", word) and int(word) <= MAX_TARGETS:
            count = int(word)
        else:
            raise ExpressionError(
                f"the count of a semantic prompt is one of {', '.join(COUNT_WORDS)} or 0 to {MAX_TARGETS}, "
                f"not {fields[3][:20]!r}"
            )
        return cls.from_fields(fields[:3], count)

    @classmethod
    def from_fields(cls, fields: Sequence[str], count: int) -> SemanticPrompt:
        """From three texts as a model may write them: cleaned, "any" and "-" read as empty."""
        clean = [_clean(field).replace(SEPARATOR, " ").strip() for field in fields]
        category, attributes, relation = ("" if field in (ANY, "-") else field for field in clean)
        return cls(category or "object", attributes, relation, count)


@dataclass(frozen=True)
class SpatialPrompt:
    """Where the targets are.

    Attributes:
        boxes: float32 [K, 4], xyxy in 0..1 of the image's width and height.
        points: float32 [K, 2], an interior point xy of each instance, in 0..1.
    """

    boxes: np.ndarray
    points: np.ndarray

    @property
    def count(self) -> int:
        """K, the number of instances."""
        return int(self.boxes.shape[0])

    @property
    def locations(self) -> npt.NDArray[np.int64]:
        """int64 [K, 6] location indices 0..999: point x, y, then box x1, y1, x2, y2.

        Raises:
            BoxError: a coordinate is NaN or infinite.
        """
        return to_location(np.concatenate([self.points, self.boxes], axis=1))

    @property
    def text(self) -> str:
        """The location tokens of all instances, as the model writes them."""
        return "".join(location_token(int(i)) for i in self.locations.reshape(-1))

    @classmethod
    def from_locations(cls, locations: npt.ArrayLike) -> SpatialPrompt:
        """From int [6K] location indices, as generated: bin centres, box corners put in order.

        Raises:
            BoxError: an index outside 0..999. ValueError: their number is no multiple of 6.
        """
        values = from_location(locations).reshape(-1, LOCATIONS_PER_INSTANCE)
        low = np.minimum(values[:, 2:4], values[:, 4:6])
        high = np.maximum(values[:, 2:4], values[:, 4:6])
        return cls(np.concatenate([low, high], axis=1), values[:, :2].copy())

    @classmethod
    def empty(cls) -> SpatialPrompt:
        """No instance: what goes with the answer "none"."""
        return cls(np.zeros((0, 4), np.float32), np.zeros((0, 2), np.float32))

    def distinct(self) -> SpatialPrompt:
        """Without what repeats an earlier instance: models that counted too many tell one again.

        Of boxes that overlap by an IoU of `SAME` or more the first stays; the order does too.
        """
        kept = list[int]()
        for index, box in enumerate(self.boxes):
            if not (iou(self.boxes[kept], box) >= SAME).any():
                kept.append(index)
        return SpatialPrompt(self.boxes[kept], self.points[kept])


@dataclass(frozen=True)
class Conversation:
    """The fixed texts around image, expression and answers.

    ``ruler`` location tokens open the system turn: their positions repeat the column (and row) spacing of
    the image tokens under multimodal rotary positions, which gives image tokens an absolute place to look up.
    """

    ruler: int = 8

    @property
    def before_image(self) -> str:
        """The system turn with the ruler, and the user turn's opening."""
        spaced = (int((i + 0.5) * LOCATION_BINS / self.ruler) for i in range(self.ruler))
        marks = "".join(location_token(i) for i in spaced)
        return f"{IM_START}system\n{marks}{IM_END}\n{IM_START}user\n{VISION_START}"

    @property
    def after_image(self) -> str:
        """Between image and expression."""
        return VISION_END

    @property
    def after_expression(self) -> str:
        """The opening of stage 1's answer."""
        return f"{IM_END}\n{IM_START}assistant\n"

    @property
    def between_stages(self) -> str:
        """The request of stage 2, and the opening of its answer."""
        return f"{IM_END}\n{IM_START}user\n{SPATIAL_REQUEST}{IM_END}\n{IM_START}assistant\n"


MAX_CHARACTERS = 1000
"""Longest expression, before its tokens are counted."""

_UNSEEN = ("Cc", "Cs", "Co", "Cn", "Zl", "Zp")
# Joiners and marks shape their neighbours (emoji, Arabic, accents) but show nothing by themselves.
_SHAPING = ("Cf", "Mn", "Me", "Zs")
_FORM = (
    "write 'category; attributes; relation; count', for example 'sphere; red metal; left of green cube; one'"
)
_EXAMPLES = {
    "expression": "say what to segment, for example 'the red cube'",
    "semantic prompt": _FORM,
}


def clean_expression(text: str, *, what: str = "expression") -> str:
    """An expression as the tokenizer gets it: NFC, lower case, no control characters, single spaces.

    Text that looks like a special token (``<|im_end|>``) is broken up, so that an expression can never
    speak for the conversation.

    Args:
        what: "expression" or "semantic prompt", for the messages.

    Raises:
        ExpressionError: nothing to be seen is left, or more than `MAX_CHARACTERS` were given.
    """
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(
            f"the {what} has {len(text)} characters, the limit is {MAX_CHARACTERS}: shorten it to one phrase"
        )
    text = _clean(text)
    if all(unicodedata.category(c) in _SHAPING for c in text):
        raise ExpressionError(f"the {what} is empty: {_EXAMPLES[what]}")
    return text


def _clean(text: str) -> str:
    # Lower case first: it can take letters apart, which NFC puts together again.
    text = unicodedata.normalize("NFC", text.lower())
    text = "".join(" " if unicodedata.category(c) in _UNSEEN else c for c in text)
    return " ".join(text.replace("<|", "< |").split())
