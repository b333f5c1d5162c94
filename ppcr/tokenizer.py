"""The prompt MLLM's tokenizer without torch or transformers: ids, answers, constraints of both stages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from ppcr.constraint import Choice, Constraint, Free
from ppcr.errors import BundleError, ExpressionError
from ppcr.prompts import (
    COUNT_WORDS,
    IMAGE_PAD,
    LOCATION_BINS,
    LOCATIONS_PER_INSTANCE,
    SEPARATOR,
    SPECIAL_TOKENS,
    Conversation,
    SemanticPrompt,
    SpatialPrompt,
    clean_expression,
    location_token,
)

# As byte-level BPE writes them: control characters (and DEL) are shifted to U+0100 and on.
_BREAKING = {SEPARATOR, "<", *map(chr, range(0x100, 0x120)), "\u0121"}

_CURE = "use the one written beside the checkpoint"

CATEGORY_TOKENS, ATTRIBUTE_TOKENS, RELATION_TOKENS = 4, 8, 24
"""Longest answer of each free field of the semantic prompt, in tokens."""


class Texts(Protocol):
    """The fixed texts of a conversation."""

    @property
    def before_image(self) -> str:
        """Everything up to the image's tokens."""
        ...

    @property
    def after_image(self) -> str:
        """Between image and expression."""
        ...

    @property
    def after_expression(self) -> str:
        """From the expression to stage 1's answer."""
        ...

    @property
    def between_stages(self) -> str:
        """From stage 1's answer to stage 2's."""
        ...


class PromptTokenizer:
    """Token ids of the conversation, and what each stage may answer.

    Args:
        tokenizer: a byte-level BPE with the Qwen special tokens and ``<|loc_000|>`` to ``<|loc_999|>``.
        conversation: the fixed texts.
        location_step: answers are written with the middle one of so many neighbouring location tokens, no
            finer than the model can tell. Otherwise the last bits of a product decide between neighbours,
            and answers differ from engine to engine by what nobody sees.
    """

    def __init__(
        self, tokenizer: Tokenizer, conversation: Conversation | None = None, location_step: int = 1
    ) -> None:
        if not 1 <= location_step <= LOCATION_BINS:
            told = f"location_step is {location_step} in the configuration"
            raise BundleError(f"{told}: it must be 1 to {LOCATION_BINS}")
        self.tokenizer, self._location_step = tokenizer, location_step
        self.conversation: Texts = conversation or Conversation()
        self.first_location = self._id(location_token(0))
        if self._id(location_token(LOCATION_BINS - 1)) != self.first_location + LOCATION_BINS - 1:
            raise BundleError(f"the location tokens of this tokenizer.json are not in a row: {_CURE}")

    @classmethod
    def load(
        cls, path: Path, conversation: Conversation | None = None, location_step: int = 1
    ) -> PromptTokenizer:
        """Read ``tokenizer.json``.

        Raises:
            BundleError: missing, unreadable or without location tokens.
        """
        return cls(read_tokenizer(path), conversation, location_step)

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise BundleError(f"this tokenizer.json has no token {token!r}: {_CURE}")
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, nothing added; special tokens in it count as such."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def image_token(self) -> int:
        """The id that stands once for each of an image's features."""
        return self._id(IMAGE_PAD)

    @cached_property
    def before_image(self) -> list[int]:
        """Ids of the conversation up to the image."""
        return self.encode(self.conversation.before_image)

    @cached_property
    def after_image(self) -> list[int]:
        """Ids between image and expression."""
        return self.encode(self.conversation.after_image)

    @cached_property
    def after_expression(self) -> list[int]:
        """Ids from the expression to stage 1's answer."""
        return self.encode(self.conversation.after_expression)

    @cached_property
    def between_stages(self) -> list[int]:
        """Ids from stage 1's answer to stage 2's."""
        return self.encode(self.conversation.between_stages)

    def prefix(self, image_tokens: int) -> list[int]:
        """Ids shared by every expression of one image: system turn, image, up to the expression."""
        return self.before_image + [self.image_token] * image_tokens + self.after_image

    def expression(self, text: str, *, max_tokens: int = 96) -> list[int]:
        """Ids of one cleaned expression and the opening of the answer.

        Raises:
            ExpressionError: empty, or longer than ``max_tokens`` tokens.
        """
        ids = self.encode(clean_expression(text))
        if len(ids) > max_tokens:
            raise ExpressionError(
                f"the expression takes {len(ids)} tokens, this bundle reads at most {max_tokens}: shorten it"
            )
        return ids + self.after_expression

    @cached_property
    def text_tokens(self) -> tuple[int, ...]:
        """Ids a free field may use: every token but special ones, locations and what would break the format.

        Left out are tokens with the separator inside (only the separator itself ends a field), with ``<``
        (it opens special tokens) and with control characters.
        """
        special = {self._id(t) for t in SPECIAL_TOKENS}
        locations = self._locations
        used = self.tokenizer.get_vocab(with_added_tokens=True).items()
        fit = {i for text, i in used if not _BREAKING & set(text)}
        return tuple(sorted(fit - special - set(locations)))

    @cached_property
    def separator(self) -> int:
        """The id that ends a free field."""
        return self._id(SEPARATOR)

    @cached_property
    def count_tokens(self) -> tuple[int, ...]:
        """Ids of `` none``, `` one``, … `` six`` in that order: one token each."""
        ids = [self.encode(f" {word}") for word in COUNT_WORDS]
        if any(len(i) != 1 for i in ids):
            raise BundleError(f"this tokenizer.json splits the count words: {_CURE}")
        return tuple(i[0] for i in ids)

    @cached_property
    def semantic_constraint(self) -> Constraint:
        """``category; attributes; relation; count``."""
        lengths = (CATEGORY_TOKENS, ATTRIBUTE_TOKENS, RELATION_TOKENS)
        fields = tuple(Free(self.text_tokens, self.separator, n) for n in lengths)
        return Constraint((*fields, Choice(self.count_tokens)))

    def spatial_constraint(self, count: int) -> Constraint:
        """Six location tokens for each of ``count`` instances."""
        return Constraint((self._location,) * (LOCATIONS_PER_INSTANCE * count))

    @property
    def _locations(self) -> range:
        return range(self.first_location, self.first_location + LOCATION_BINS)

    @cached_property
    def _location(self) -> Choice:
        step = self._location_step
        return Choice(tuple(self._locations[step // 2 :: step]))

    def semantic(self, ids: Sequence[int]) -> SemanticPrompt:
        """The semantic prompt of an answer within ``semantic_constraint``. Raises ValueError on others."""
        fields: list[list[int]] = [[]]
        for token in ids:
            if token == self.separator:
                fields.append([])
            else:
                fields[-1].append(token)
        *free, (count,) = fields
        return SemanticPrompt.from_fields([self.decode(f) for f in free], self.count_tokens.index(count))

    def spatial(self, ids: Sequence[int], size: tuple[int, int] = (1, 1)) -> SpatialPrompt:
        """The spatial prompt of an answer within ``spatial_constraint``.

        size: height and width in pixels of the image as the model saw it; locations do not depend on it.
        Raises BoxError or ValueError on other answers.
        """
        return SpatialPrompt.from_locations(np.asarray(ids, np.int64) - self.first_location)

    def spatial_ids(self, prompt: SpatialPrompt, size: tuple[int, int] = (1, 1)) -> list[int]:
        """What the model would have written to say ``prompt``."""
        return [int(i) + self.first_location for i in prompt.locations.reshape(-1)]


def read_tokenizer(path: Path) -> Tokenizer:
    """Read ``tokenizer.json``. Raises BundleError when it is missing or unreadable."""
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise BundleError(f"cannot read {path}: {error}; build or fetch the bundle again") from None
