"""Packed training sequences: one image, then as many conversations about it as fit.

Every conversation attends to the image prefix and to itself only, at the positions it has at inference, so
an image is encoded once for all its expressions. Location tokens are references to object coordinates,
filled in after rendering, because boxes come from the rendered masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppcr.data.expressions import Expression
from ppcr.prompts import LOCATIONS_PER_INSTANCE
from ppcr.tokenizer import PromptTokenizer

IGNORE = -100
NO_REFERENCE = -1


@dataclass
class Packed:
    """One packed sequence of length T (arrays int64 unless said).

    Attributes:
        ids [T]: token ids, locations left at 0 where ``reference`` says so.
        reference [T]: object * 6 + coordinate for a location token, else -1.
        positions [3, T]: multimodal rotary positions.
        segment [T]: 0 for the image prefix, 1.. for conversations, -1 for padding.
        labels [T]: id the position must predict, or IGNORE (also where the label is a location).
        label_reference [T]: location reference the position must predict, else -1.
        weight [T]: float32 weight of the position's loss.
        pointing [T]: conversation (0-based) at positions that should know where its targets are, else -1.
        targets [K, N]: bool, targets of each conversation among N objects; landmarks likewise.
    """

    ids: np.ndarray
    reference: np.ndarray
    positions: np.ndarray
    segment: np.ndarray
    labels: np.ndarray
    label_reference: np.ndarray
    weight: np.ndarray
    pointing: np.ndarray
    targets: np.ndarray
    landmarks: np.ndarray


def image_positions(start: int, grid: int) -> np.ndarray:
    """int64 [3, grid*grid] rotary positions of image tokens that begin at text position ``start``."""
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    return np.stack([np.full(grid * grid, start), start + rows, start + columns])


class Packer:
    """Packs conversations into sequences of ``length`` tokens."""

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        *,
        grid: int,
        length: int,
        objects: int,
        conversations: int,
        count_weight: float = 8.0,
    ) -> None:
        self.tokenizer = tokenizer
        self.length, self.objects, self.conversations = length, objects, conversations
        self.count_weight = count_weight
        before = tokenizer.before_image
        self.prefix = tokenizer.prefix(grid * grid)
        start = len(before)
        text = np.arange(start)
        after = start + grid + np.arange(len(tokenizer.after_image))
        self.prefix_positions = np.concatenate(
            [np.stack([text] * 3), image_positions(start, grid), np.stack([after] * 3)], axis=1
        )
        self.next_position = int(after[-1]) + 1

    def pack(self, expressions: Sequence[Expression]) -> Packed:
        """Pack the expressions that fit, in order."""
        length, p = self.length, len(self.prefix)
        packed = Packed(
            ids=np.zeros(length, np.int64),
            reference=np.full(length, NO_REFERENCE, np.int64),
            positions=np.zeros((3, length), np.int64),
            segment=np.full(length, -1, np.int64),
            labels=np.full(length, IGNORE, np.int64),
            label_reference=np.full(length, NO_REFERENCE, np.int64),
            weight=np.ones(length, np.float32),
            pointing=np.full(length, -1, np.int64),
            targets=np.zeros((self.conversations, self.objects), bool),
            landmarks=np.zeros((self.conversations, self.objects), bool),
        )
        packed.ids[:p], packed.positions[:, :p], packed.segment[:p] = self.prefix, self.prefix_positions, 0
        at, number = p, 0
        for expression in expressions:
            if number == self.conversations:
                break
            at = self._place(packed, expression, at, number)
            number = int(packed.segment.max())
        return packed

    def _place(self, packed: Packed, expression: Expression, at: int, number: int) -> int:
        tokens = self.tokenizer
        question = tokens.expression(expression.text)
        answer = tokens.encode(expression.semantic.text)
        between = tokens.between_stages if expression.targets else []
        locations = len(expression.targets) * LOCATIONS_PER_INSTANCE
        # The last location is predicted but never read, so it takes no place.
        size = len(question) + len(answer) + len(between) + max(0, locations - 1)
        if at + size > self.length:
            return at
        end_answer = at + len(question) + len(answer)
        packed.ids[at:end_answer] = question + answer
        spatial = end_answer + len(between)
        packed.ids[end_answer:spatial] = between
        references = [
            t * LOCATIONS_PER_INSTANCE + c for t in expression.targets for c in range(LOCATIONS_PER_INSTANCE)
        ]
        packed.reference[spatial : at + size] = references[:-1] if references else []
        packed.positions[:, at : at + size] = self.next_position + np.arange(size)
        packed.segment[at : at + size] = number + 1
        first_answer = at + len(question)
        packed.labels[first_answer - 1 : end_answer - 1] = answer
        packed.weight[end_answer - 2] = self.count_weight
        packed.pointing[first_answer - 1 : end_answer - 1] = number
        if references:
            packed.label_reference[spatial - 1 : at + size] = references
        packed.targets[number, list(expression.targets)] = True
        packed.landmarks[number, list(expression.landmarks)] = True
        return at + size


def stack(packs: Sequence[Packed]) -> dict[str, np.ndarray]:
    """A batch of packed sequences: each field with a leading batch axis."""
    fields = Packed.__dataclass_fields__
    return {name: np.stack([getattr(p, name) for p in packs]) for name in fields}


def attention_mask(segment: np.ndarray) -> np.ndarray:
    """bool [B, 1, T, T]: causal, prefix and own conversation only; padding sees itself."""
    length = segment.shape[1]
    causal = np.tril(np.ones((length, length), bool))
    key, query = segment[:, None, :], segment[:, :, None]
    return ((causal & ((key == 0) | (key == query))) | np.eye(length, dtype=bool))[:, None]
