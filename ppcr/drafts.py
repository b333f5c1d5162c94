"""A guess at the semantic prompt from the words alone, for speculative decoding.

A trained MLLM writes the same few canonical words for the many wordings it has learned. A glossary lists
both, so that most answers can be guessed before the model runs; it then checks a whole guess in one forward
call instead of writing it token by token. What it would have written otherwise decides: a wrong guess costs
time and changes nothing. So does the guess that a single thing is asked for and there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ppcr.errors import BundleError
from ppcr.files import read_json, write_json
from ppcr.kinds import read_fields
from ppcr.prompts import SEPARATOR, SemanticPrompt, clean_expression

FORMAT = 1
CATEGORY, RELATION, ORDER, RANK, SIDE, NOT, AND, SKIP = (
    "category", "relation", "order", "rank", "side", "not", "and", "skip",
)  # fmt: skip
"""What a wording may stand for, besides an attribute. A relation is followed by what it relates to, an order
("leftmost") is not; a rank and a side are an order together ("second" and "from left"), also far apart."""

_ARTICLES = ("the", "a", "an")
_WORD, _NON = re.compile(r"[\w'-]+"), re.compile(r"\bnon-")


@dataclass(frozen=True)
class Glossary:
    """Wordings and the canonical words of a semantic prompt that they stand for.

    Attributes:
        attributes: kinds of attributes ("size", "color", …), in the order in which an answer tells them.
        wordings: what it stands for (one of these kinds or of this module's constants), canonical words,
            wording without articles; a wording may have several meanings.
        several: words of expressions that ask for more than one.
        pairs: relations to two landmarks, told as "A and B".
        anything: category of an answer where none was named.
    """

    attributes: tuple[str, ...]
    wordings: tuple[tuple[str, str, str], ...]
    several: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    anything: str = "object"
    format: int = FORMAT

    @classmethod
    def load(cls, path: Path) -> Glossary:
        """Read what `save` wrote. Raises BundleError: it is damaged or of another version."""
        cure = "copy it again from the checkpoint, or remove it there and build again"
        values = read_json(path, BundleError, cure=cure)
        try:
            glossary = read_fields(cls, values)
            if any(SEPARATOR in canonical for _, canonical, _ in glossary.wordings):
                raise TypeError(f"{SEPARATOR!r} in a canonical word")
        except TypeError as error:
            raise BundleError(f"cannot read {path}: {error}; {cure}") from None
        if glossary.format != FORMAT:
            raise BundleError(f"{path} has format {glossary.format}, this version reads {FORMAT}; {cure}")
        return glossary

    def save(self, path: Path) -> None:
        """Write it as JSON, at once."""
        write_json(path, dataclasses.asdict(self))

    def draft(self, expression: str) -> str:
        """The semantic prompt, "category; attributes; relation; one", or "" for no idea.

        Without the count where several are asked for: how many there are is read off the image.

        Raises ExpressionError as `ppcr.prompts.clean_expression` does.
        """
        text = clean_expression(expression)
        items = list(self._items(text))
        if not any(item.keys() - {NOT, AND, SKIP} for item in items):
            return ""
        phrase = _Reader(items, self).phrase()
        told = (phrase.category or self.anything, " ".join(phrase.properties), phrase.relation)
        guess = SemanticPrompt(*told).text
        if not self._several.isdisjoint(_WORD.findall(text)):
            guess = guess.rpartition(SEPARATOR)[0] + SEPARATOR
        return guess

    def _items(self, text: str) -> Iterator[Mapping[str, str]]:
        """The meanings of each wording in the text, the longest first; other words are passed over."""
        words = [word for word in _WORD.findall(_NON.sub("not ", text)) if word not in _ARTICLES]
        start = 0
        while start < len(words):
            for end in range(min(len(words), start + self._longest), start, -1):
                meanings = self._meanings.get(tuple(words[start:end]))
                if meanings:
                    yield meanings
                    start = end
                    break
            else:
                start += 1

    @cached_property
    def _meanings(self) -> dict[tuple[str, ...], dict[str, str]]:
        found: dict[tuple[str, ...], dict[str, str]] = {}
        for kind, canonical, wording in self.wordings:
            found.setdefault(tuple(_WORD.findall(wording)), {})[kind] = canonical
        return found

    @cached_property
    def _several(self) -> frozenset[str]:
        return frozenset(self.several)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._meanings), default=0)


@dataclass
class _Phrase:
    """A noun phrase; its relation, where it is one without landmarks that ``leads``, stands in front."""

    kinds: Sequence[str]
    category: str = ""
    held: dict[str, str] = field(default_factory=dict)
    relation: str = ""
    leads: bool = False

    @property
    def properties(self) -> list[str]:
        return [self.held[kind] for kind in self.kinds if kind in self.held]

    def landmark(self, anything: str) -> str:
        """As the relation of another phrase names it."""
        words = [*self.properties, self.category or anything]
        words.insert(0 if self.leads else len(words), self.relation)
        return " ".join(filter(None, words))


class _Reader:
    """Reads noun phrases off a row of meanings, each phrase the landmark of the one before."""

    def __init__(self, items: Sequence[Mapping[str, str]], glossary: Glossary) -> None:
        self._items, self._glossary, self._at = items, glossary, 0

    def phrase(self, *, landmark: bool = False, paired: bool = False) -> _Phrase:
        """The phrase that begins here. A pair's "and" ends its first landmark; "and not" ends any."""
        phrase, negative, rank, side = _Phrase(self._glossary.attributes), False, "", ""
        while self._at < len(self._items):
            item = self._items[self._at]
            if landmark and phrase.category and AND in item and (paired or NOT in self._next()):
                break
            self._at += 1
            if NOT in item:
                negative = True
            for kind in phrase.kinds:
                if kind in item:
                    phrase.held[kind] = f"not {item[kind]}" if negative else item[kind]
                    negative = False
            rank, side = item.get(RANK, rank), item.get(SIDE, side)
            if CATEGORY in item:
                phrase.category = phrase.category or item[CATEGORY]
            elif ORDER in item and not (phrase.category and RELATION in item):
                phrase.relation, phrase.leads = item[ORDER], True
            elif RELATION in item:
                phrase.relation, phrase.leads = self._related(item[RELATION]), False
        if rank and side:
            phrase.relation, phrase.leads = f"{rank} {side}", False
        return phrase

    def _next(self) -> Mapping[str, Any]:
        return self._items[self._at + 1] if self._at + 1 < len(self._items) else {}

    def _related(self, relation: str) -> str:
        paired = relation in self._glossary.pairs
        landmarks = [self.phrase(landmark=True, paired=paired)]
        if paired and self._at < len(self._items):
            self._at += 1
            landmarks.append(self.phrase(landmark=True))
        told = " and ".join(one.landmark(self._glossary.anything) for one in landmarks)
        return f"{relation} {told}"
