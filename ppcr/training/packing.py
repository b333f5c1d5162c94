"""Packed training sequences: one image, then many conversations about it, each in its slot.

Every conversation attends to the image prefix and to itself only, at the positions it has at inference, so
an image is encoded once for all its expressions. Some slots are long enough for both stages; the others
hold the first stage alone, which is the harder one to learn. Location tokens are references to object
coordinates, filled in after rendering, because boxes come from the rendered masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppcr.data.expressions import Expression
from ppcr.data.graph import SceneGraph
from ppcr.data.relations import Relations
from ppcr.model.slot_attention import Layout
from ppcr.prompts import LOCATIONS_PER_INSTANCE
from ppcr.tokenizer import PromptTokenizer
from ppcr.training.supervision import object_sets

IGNORE = -100
NO_REFERENCE = -1


@dataclass
class Packed:
    """One packed sequence of length T with S slots (arrays int64 unless said).

    Attributes:
        ids [T]: token ids, locations left at 0 where ``reference`` says so.
        reference [T]: object * 6 + coordinate for a location token, else -1.
        positions [3, T]: multimodal rotary positions.
        labels [T]: id the position must predict, or IGNORE (also where the label is a location).
        label_reference [T]: location reference the position must predict, else -1.
        weight [T]: float32 weight of the position's loss.
        pointing [T]: slot of positions that should know where its targets are, else -1.
        wanted [S, 5, N]: bool, ``ObjectSets`` of each slot among N objects.
        used [S]: bool, slots that hold a conversation.
    """

    ids: np.ndarray
    reference: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    label_reference: np.ndarray
    weight: np.ndarray
    pointing: np.ndarray
    wanted: np.ndarray
    used: np.ndarray


def image_positions(start: int, grid: int) -> np.ndarray:
    """int64 [3, grid*grid] rotary positions of image tokens that begin at text position ``start``."""
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    return np.stack([np.full(grid * grid, start), start + rows, start + columns])


@dataclass(frozen=True)
class _Tokens:
    """One conversation: its question, its answer, and what stage 2 adds (empty without targets)."""

    question: list[int]
    answer: list[int]
    between: list[int]
    references: list[int]

    @property
    def first_stage(self) -> int:
        return len(self.question) + len(self.answer)

    @property
    def several(self) -> bool:
        return len(self.references) > LOCATIONS_PER_INSTANCE

    @property
    def both_stages(self) -> int:
        # The last location is predicted but never read, so it takes no place.
        return self.first_stage + len(self.between) + max(0, len(self.references) - 1)


class Packer:
    """Packs conversations into the slots of one layout.

    Args:
        tokenizer: of the model.
        grid: image tokens along one side.
        objects: N, the most objects of a scene.
        slots: (how many, of which length): short ones first, then the ones for both stages.
        count_weight: weight of the count word's loss; other words have 1.
    """

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        *,
        grid: int,
        objects: int,
        slots: tuple[tuple[int, int], tuple[int, int]] = ((12, 40), (6, 68)),
        count_weight: float = 8.0,
    ) -> None:
        self.tokenizer, self.objects, self.count_weight = tokenizer, objects, count_weight
        before = tokenizer.before_image
        self.prefix = tokenizer.prefix(grid * grid)
        self.layout = Layout(len(self.prefix), slots)
        start = len(before)
        text = np.arange(start)
        after = start + grid + np.arange(len(tokenizer.after_image))
        self.prefix_positions = np.concatenate(
            [np.stack([text] * 3), image_positions(start, grid), np.stack([after] * 3)], axis=1
        )
        self.next_position = int(after[-1]) + 1

    @property
    def conversations(self) -> int:
        """Most conversations about one image."""
        return len(self.layout.places)

    def pack(self, graph: SceneGraph, expressions: Sequence[Expression]) -> Packed:
        """Pack the expressions that find a slot.

        Those too long for a short slot choose among the long ones first, then those with several targets:
        they are few, and how to go on to the next box is learnt from nothing else.
        """
        relations = Relations(graph)
        length, p, places = self.layout.length, len(self.prefix), self.layout.places
        packed = Packed(
            ids=np.zeros(length, np.int64),
            reference=np.full(length, NO_REFERENCE, np.int64),
            positions=np.zeros((3, length), np.int64),
            labels=np.full(length, IGNORE, np.int64),
            label_reference=np.full(length, NO_REFERENCE, np.int64),
            weight=np.ones(length, np.float32),
            pointing=np.full(length, -1, np.int64),
            wanted=np.zeros((len(places), 5, self.objects), bool),
            used=np.zeros(len(places), bool),
        )
        packed.ids[:p], packed.positions[:, :p] = self.prefix, self.prefix_positions
        (short_count, short), (_, long) = self.layout.slots
        free_short, free_long = list(range(short_count)), list(range(short_count, len(places)))
        tokens = [self._tokens(expression) for expression in expressions]
        fits_short, several = ([t.first_stage <= short for t in tokens], [t.several for t in tokens])
        for i in sorted(range(len(tokens)), key=lambda i: (fits_short[i], not several[i])):
            one = tokens[i]
            both = bool(one.references) and one.both_stages <= long and bool(free_long)
            if both or one.first_stage > short:
                free = free_long if one.first_stage <= long else []
            else:
                free = free_short
            if free:
                slot = free.pop(0)
                self._place(packed, one, slot, both=both)
                packed.wanted[slot] = object_sets(relations, expressions[i]).rows(self.objects)
        return packed

    def _tokens(self, expression: Expression) -> _Tokens:
        tokens, coordinates = self.tokenizer, range(LOCATIONS_PER_INSTANCE)
        return _Tokens(
            tokens.expression(expression.text),
            tokens.encode(expression.semantic.text),
            tokens.between_stages if expression.targets else [],
            [target * LOCATIONS_PER_INSTANCE + c for target in expression.targets for c in coordinates],
        )

    def _place(self, packed: Packed, tokens: _Tokens, slot: int, *, both: bool) -> None:
        at, room = self.layout.places[slot]
        packed.positions[:, at : at + room] = self.next_position + np.arange(room)
        first_answer = at + len(tokens.question)
        end_answer = at + tokens.first_stage
        packed.ids[at:end_answer] = tokens.question + tokens.answer
        packed.labels[first_answer - 1 : end_answer - 1] = tokens.answer
        packed.weight[end_answer - 2] = self.count_weight
        packed.pointing[first_answer - 1 : end_answer - 1] = slot
        if both:
            spatial, end = end_answer + len(tokens.between), at + tokens.both_stages
            packed.ids[end_answer:spatial] = tokens.between
            packed.reference[spatial:end] = tokens.references[:-1]
            packed.label_reference[spatial - 1 : end] = tokens.references
        packed.used[slot] = True


def stack(packs: Sequence[Packed]) -> dict[str, np.ndarray]:
    """A batch of packed sequences: each field with a leading batch axis."""
    fields = Packed.__dataclass_fields__
    return {name: np.stack([getattr(p, name) for p in packs]) for name in fields}
