"""The words: one query becomes one of its many paraphrases, and one canonical semantic prompt.

Expressions are lower case, from a closed vocabulary. Every wording maps to one canonical phrase, so the
semantic prompt follows from the words alone (its count aside, which is read off the image).
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from ppcr.data.graph import MATERIALS
from ppcr.data.relations import BETWEEN, ORDINALS, SUPERLATIVES, Phrase, Query
from ppcr.prompts import SemanticPrompt

T = TypeVar("T")

NOUNS: dict[str, tuple[tuple[str, str], ...]] = {
    "cube": (("cube", "cubes"), ("block", "blocks"), ("box", "boxes")),
    "sphere": (("sphere", "spheres"), ("ball", "balls"), ("orb", "orbs")),
    "cylinder": (("cylinder", "cylinders"), ("can", "cans"), ("tube", "tubes"), ("drum", "drums")),
    "cone": (("cone", "cones"), ("funnel", "funnels")),
    "pyramid": (("pyramid", "pyramids"),),
    "ring": (("ring", "rings"), ("donut", "donuts"), ("torus", "tori"), ("hoop", "hoops")),
    "": (("object", "objects"), ("thing", "things"), ("item", "items"), ("shape", "shapes")),
}
"""Canonical shape -> (singular, plural) nouns, the first the commonest; "" for any object."""

ADJECTIVES: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny", "small-sized"),
    "medium": ("medium", "medium-sized", "mid-sized", "middle-sized"),
    "large": ("large", "big", "huge", "large-sized"),
    "rubber": ("rubber", "matte", "dull", "matt"),
    "metal": ("metal", "metallic", "shiny", "glossy"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
}
"""Canonical property -> its words; a property that is not listed is its own only word."""

BINARY: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of", "on the left side of", "left from"),
    "right of": ("right of", "to the right of", "on the right of", "on the right side of", "right from"),
    "above": ("above", "higher than", "further up than", "higher up than", "over"),
    "below": ("below", "lower than", "under", "further down than", "beneath", "underneath"),
    "behind": ("behind", "in back of", "farther back than", "further back than", "further away than"),
    "in front of": (
        "in front of",
        "closer to the camera than",
        "nearer to the camera than",
        "closer to us than",
        "closer to the viewer than",
        "closer than",
    ),
    "nearest to": ("nearest to", "closest to", "nearest", "next to", "beside", "right next to"),
    "farthest from": ("farthest from", "furthest from", "most distant from", "farthest away from"),
    BETWEEN: ("between", "in between", "in the middle of", "somewhere between"),
}
"""Relation -> its wordings, each followed by the landmark (by "A and B" for between)."""

LEADING: dict[str, tuple[str, ...]] = {
    "leftmost": ("leftmost", "left", "far left", "left-most"),
    "rightmost": ("rightmost", "right", "far right", "right-most"),
    "topmost": ("topmost", "top", "highest", "uppermost"),
    "bottommost": ("bottommost", "bottom", "lowest", "lowermost"),
    "nearest": ("nearest", "closest", "front", "frontmost"),
    "farthest": ("farthest", "furthest", "rearmost", "most distant"),
    "largest": ("largest", "biggest"),
    "smallest": ("smallest", "tiniest", "littlest"),
}
"""Superlative -> wordings in front of the noun ("the leftmost ball")."""

TRAILING: dict[str, tuple[str, ...]] = {
    "leftmost": ("on the left", "on the far left", "farthest to the left", "furthest left"),
    "rightmost": ("on the right", "on the far right", "farthest to the right", "furthest right"),
    "topmost": ("at the top", "highest up", "at the very top", "first from the top"),
    "bottommost": ("at the bottom", "lowest down", "at the very bottom", "first from the bottom"),
    "nearest": ("closest to the camera", "nearest to the camera", "closest to us", "nearest to the viewer"),
    "farthest": ("farthest from the camera", "furthest away", "at the back", "at the very back"),
    "largest": ("of the largest size", "bigger than the others", "larger than the rest"),
    "smallest": ("of the smallest size", "smaller than the others", "smaller than the rest"),
}
"""Superlative -> wordings after the noun ("the ball on the far left")."""

RANK_WORDS = {"second": ("second", "2nd"), "third": ("third", "3rd"), "fourth": ("fourth", "4th")}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")

COMMANDS = (
    *("find {}", "segment {}", "select {}", "show {}", "show me {}", "highlight {}", "mark {}", "locate {}"),
    *("pick {}", "outline {}", "point to {}", "mask {}", "get {}", "give me {}", "look for {}", "i want {}"),
    *("i need {}", "please segment {}", "please find {}", "please highlight {}", "find me {}"),
    *("where is {}", "could you mark {}"),
    *("segment {} please", "can you find {}", "can you segment {}", "could you show me {}"),
)
PLURAL_COMMANDS = {"where is {}": "where are {}"}


@dataclass(frozen=True)
class Style:
    """How one expression speaks: ``articles`` off is telegraphic ("red ball left of cube")."""

    articles: bool = True

    def the(self, noun: str) -> str:
        return f"the {noun}" if self.articles else noun

    def trim(self, text: str) -> str:
        """A wording with its own articles dropped where the style has none."""
        return text if self.articles else text.replace("the ", "")


class Dice:
    """Cheap scalar draws, seeded once per scene."""

    def __init__(self, seed: int) -> None:
        self.uniform = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.uniform() * len(items))]

    def first(self, items: Sequence[str], favour: float = 0.4) -> str:
        """The first item with probability ``favour``, else any."""
        return items[0] if self.uniform() < favour else self.pick(items)

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        total = list(accumulate(weights))
        return items[min(bisect(total, self.uniform() * total[-1]), len(items) - 1)]


def canonical_phrase(phrase: Phrase) -> str:
    """The phrase as a semantic prompt names a landmark: "red cube left of ring", "leftmost red cube"."""
    relation = canonical_relation(phrase)
    before, after = (relation, "") if phrase.relation in SUPERLATIVES else ("", relation)
    words = (before, phrase.size, phrase.color, phrase.material, phrase.shape or "object", after)
    return " ".join(word for word in words if word)


def canonical_relation(phrase: Phrase) -> str:
    """The relation field of a semantic prompt, "" for none."""
    return " ".join((phrase.relation, " and ".join(map(canonical_phrase, phrase.landmarks)))).strip()


def semantic_prompt(query: Query, count: int) -> SemanticPrompt:
    """The semantic prompt of a query with ``count`` targets in the image (0..6)."""
    phrase = query.phrase
    attributes = " ".join(word for word in (phrase.size, phrase.color, phrase.material) if word)
    return SemanticPrompt(phrase.shape or "object", attributes, canonical_relation(phrase), count)


def express(query: Query, count: int, dice: Dice) -> str:
    """One wording of a query. ``count`` (the number of targets) only permits "both", "the two", ...

    The text is lower case and at most some 40 words long.
    """
    style = Style(articles=not dice.chance(0.15))
    parts = _Parts.draw(query.phrase, query.plural, style, dice)
    roll = dice.uniform()
    if roll < 0.15 and style.articles and parts.clauses:
        text = parts.question(query.plural, dice)
    else:
        text = parts.counted(count, style, dice) if query.plural else parts.singular(style, dice)
        if roll < 0.5:
            command = dice.pick(COMMANDS)
            text = (PLURAL_COMMANDS.get(command, command) if query.plural else command).format(text)
    question = text.startswith(("wh", "can you", "could you"))
    if dice.chance(0.4 if question else 0.06):
        text += "?" if question else "."
    return text


@dataclass(frozen=True)
class _Parts:
    """A noun phrase before its determiner is chosen: "red", "ball", ["that is shiny", "left of the cube"]."""

    before: tuple[str, ...]
    noun: str
    clauses: tuple[tuple[str, bool], ...]
    """What follows the noun, and whether it may do so without "that is"."""
    definite: bool
    """A superlative or ordinal stands before the noun: only "the" fits."""
    plural: bool

    @classmethod
    def draw(cls, phrase: Phrase, plural: bool, style: Style, dice: Dice, loose: float = 0.22) -> _Parts:
        """``loose`` is how often properties follow the noun ("ball that is red") where nothing else does."""
        clauses: list[tuple[str, bool]] = []
        before: list[str] = []
        # "The second ball from the left that is red" can count all balls or red ones: keep "red" in front.
        fixed = phrase.relation in SUPERLATIVES or phrase.relation in ORDINALS
        move = not phrase.relation and dice.chance(loose)
        for word in _adjective_order(phrase, dice):
            negative = word.startswith("not ")
            value = word[4:] if negative else word
            surface = dice.first(ADJECTIVES.get(value, (value,)), 0.5)
            made = value in MATERIALS and loose and not fixed and dice.chance(0.15)
            if negative and (fixed or dice.chance(0.2)):
                before.append(f"non-{value}")
            elif made:
                clauses.append((f"not made of {value}" if negative else f"made of {value}", True))
            elif negative:
                clauses.append((f"not {surface}", False))
            elif move:
                clauses.append((surface, False))
            else:
                before.append(surface)
        clauses.sort(key=lambda clause: clause[0].startswith("not "))  # "not red and shiny" could negate both
        definite = False
        suffix = ""
        name = phrase.relation
        if name in SUPERLATIVES:
            if dice.chance(0.6):
                before.insert(0, dice.first(LEADING[name]))
                definite = True
            else:
                clauses.append((style.trim(dice.pick(TRAILING[name])), True))
        elif name in ORDINALS:
            rank, side = name.split(" from ")
            rank = dice.first(RANK_WORDS[rank], 0.5)
            if dice.chance(0.65):
                before.insert(0, rank)
                definite = True
                suffix = style.trim(f"from the {side}")
            else:
                clauses.append((style.trim(f"{rank} from the {side}"), True))
        elif name:
            loose_landmarks = 0.0 if name == BETWEEN else 0.1
            names = [_landmark(landmark, style, dice, loose_landmarks) for landmark in phrase.landmarks]
            clauses.append((f"{style.trim(dice.first(BINARY[name]))} {' and '.join(names)}", True))
        if suffix:
            clauses.insert(0, (suffix, True))
        return cls(tuple(before), _noun(phrase, plural, bool(before), dice), tuple(clauses), definite, plural)

    def tail(self, dice: Dice, bare_share: float = 0.65) -> str:
        """The clauses in a row: ' that is red and left of the cube'; ``bare_share`` lack the "that is"."""
        if not self.clauses:
            return ""
        texts = [text for text, _ in self.clauses]
        is_ = "are" if self.plural else "is"
        if self.clauses[0][0].startswith("from the "):  # belongs to the ordinal in front of the noun
            head = f" {texts[0]}"
            return head if len(texts) == 1 else f"{head} that {is_} {' and '.join(texts[1:])}"
        bare = all(bare for _, bare in self.clauses)
        short = "that are " if self.plural else "that's "
        link = dice.first((f"that {is_} ", f"which {is_} ", short), 0.5)
        if bare and dice.chance(bare_share):
            link = ""
        return f" {link}{' and '.join(texts)}"

    def head(self) -> str:
        return " ".join((*self.before, self.noun))

    def singular(self, style: Style, dice: Dice) -> str:
        if not style.articles:
            return self.head() + self.tail(dice)
        if self.definite or dice.chance(0.85):
            return f"the {self.head()}{self.tail(dice)}"
        return f"{'an' if self.head()[0] in 'aeiou' else 'a'} {self.head()}{self.tail(dice)}"

    def counted(self, count: int, style: Style, dice: Dice) -> str:
        """A phrase that asks for all that fit, with its determiner."""
        roll = dice.uniform()
        every = roll < 0.3
        shared = _Parts(self.before, self.noun, self.clauses, self.definite, not every)
        tail = shared.tail(dice)
        if not every:
            head = self.head()
            if count >= 2 and roll < 0.42:
                number = "both" if count == 2 and dice.chance(0.4) else style.the(NUMBERS[count])
                return f"{number} {head}{tail}"
            determiners = ("all ", "all the ", "all of the ", "the ", "") if style.articles else ("all ", "")
            return f"{dice.first(determiners)}{head}{tail}"
        noun = _SINGULAR[self.noun]
        if noun in ("object", "thing", "one") and dice.chance(0.55):
            return " ".join((dice.pick(("everything", "anything")), *self.before)) + tail
        return " ".join((dice.pick(("every", "each", "any")), *self.before, noun)) + tail

    def question(self, plural: bool, dice: Dice) -> str:
        """ "which ball is left of the cube": the clauses become the predicate."""
        is_ = "are" if plural else "is"
        clauses = list(self.clauses)
        head = self.head()
        if clauses[0][0].startswith("from the "):
            head += f" {clauses.pop(0)[0]}"
            if not clauses:
                return f"which is the {head}"
        predicate = " and ".join(text for text, _ in clauses)
        if self.definite:
            return f"which is the {head} that {is_} {predicate}"
        if not self.before and self.noun in ("object", "thing", "objects", "things") and dice.chance(0.6):
            return f"what is {predicate}" if not plural else f"which ones are {predicate}"
        return f"which {head} {is_} {predicate}"


_SINGULAR = {many: one for nouns in NOUNS.values() for one, many in nouns} | {"ones": "one"}


def _adjective_order(phrase: Phrase, dice: Dice) -> list[str]:
    order = (phrase.size, phrase.color, phrase.material)
    if dice.chance(0.4):
        order = (phrase.size, phrase.material, phrase.color)
    return [word for word in order if word]


def _noun(phrase: Phrase, plural: bool, qualified: bool, dice: Dice) -> str:
    if not phrase.shape and qualified and dice.chance(0.35):
        return "ones" if plural else "one"
    nouns = NOUNS[phrase.shape]
    return (nouns[0] if dice.chance(0.4) else dice.pick(nouns))[plural]


def _landmark(phrase: Phrase, style: Style, dice: Dice, loose: float) -> str:
    """A landmark is one object: always definite; its own relation mostly gets a "that is" to hold on to."""
    parts = _Parts.draw(phrase, False, style, dice, loose)
    return style.the(parts.head()) + parts.tail(dice, 0.2 if phrase.landmarks else 0.65)
