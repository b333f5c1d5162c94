"""Stages 1 and 2: from an expression to a semantic and a spatial prompt, on one cache per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ppcr.patches import image_patches, nearest_size
from ppcr.prompts import MAX_TARGETS, SemanticPrompt, SpatialPrompt
from runtime.bundle import Bundle
from runtime.generation import Turn, generate
from runtime.result import Costs
from runtime.session import BranchingContext, Context, Features, Float32Array, MLLMSession
from runtime.side_by_side import Ask, Conversation, converse
from runtime.timing import Stopwatch

SIDE_BY_SIDE = 16
"""Expressions that are read at once; more are read in groups of so many. Their tokens share a cache, all of
which each of them passes over: on a CPU 32 at once were no faster than twice 16, and hold twice as much."""


@dataclass(frozen=True)
class Request:
    """One expression, already checked: its ids, and what is given instead of computed."""

    expression: str
    ids: tuple[int, ...]
    semantic: SemanticPrompt | None = None
    spatial: SpatialPrompt | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the stages' outputs that are given."""
        named = {"semantic": self.semantic, "boxes": self.spatial}
        return tuple(name for name, value in named.items() if value is not None)


@dataclass(frozen=True)
class Answer:
    """Both prompts of one expression and what they cost."""

    semantic: SemanticPrompt
    spatial: SpatialPrompt
    costs: Costs


class Prompter:
    """The MLLM's view of one image.

    Vision features and the cache's prefix (system turn and image) are computed by the first expression that
    needs the MLLM; each further one goes back to the end of the prefix. Not thread-safe.

    Args:
        image: uint8 [H, W, 3] RGB, the original.
        meanwhile: called whenever steps of single tokens begin: what it starts runs beside them.
    """

    def __init__(
        self,
        bundle: Bundle,
        mllm: MLLMSession,
        image: npt.NDArray[np.uint8],
        meanwhile: Callable[[], None],
    ) -> None:
        self._meanwhile = meanwhile
        self._bundle, self._tokenizer, self._mllm, self._image = bundle, bundle.tokenizer, mllm, image
        config = bundle.config.mllm
        self._size = nearest_size((image.shape[0], image.shape[1]), config.sizes)
        # An engine that knows one size alone need not be told which.
        self._sized: dict[str, Any] = {"size": self._size} if len(config.sizes) > 1 else {}
        rows, columns = config.grid_of(self._size)
        self._prefix = bundle.tokenizer.prefix(rows * columns)
        self._before = len(bundle.tokenizer.before_image)
        self._features: Features | None = None
        self._context: Context | None = None

    def answer(self, request: Request, watch: Stopwatch) -> Answer:
        """Run the stages whose output is not given; "none" skips the second."""
        conversation, turn = self._conversation(request), None
        while True:
            try:
                ask = conversation.send(turn)
            except StopIteration as end:
                answer: Answer = end.value
                return answer
            context = self._ready(request, watch)
            with watch.stage(ask.stage):
                turn = self._read(context, ask)

    def answer_all(self, requests: Sequence[Request], watches: Sequence[Stopwatch]) -> list[Answer]:
        """As `answer` for each, `SIDE_BY_SIDE` of them at once where the engine can."""
        answers = list[Answer]()
        for first in range(0, len(requests), SIDE_BY_SIDE):
            some = slice(first, first + SIDE_BY_SIDE)
            answers += self._side_by_side(requests[some], watches[some])
        return answers

    def _side_by_side(self, requests: Sequence[Request], watches: Sequence[Stopwatch]) -> list[Answer]:
        context = self._ready(requests[0], watches[0]) if len(requests) > 1 else None
        if not isinstance(context, BranchingContext) or not context.can_branch:
            return [self.answer(request, watch) for request, watch in zip(requests, watches, strict=True)]
        with watches[0].stage("semantic"):
            block, features = self._from_image(context, ())
            if block:
                context.extend(block, features)
            branches = context.branch(len(requests))
        conversations = [self._conversation(request) for request in requests]
        first, *others = converse(branches, conversations, watches, self._meanwhile)
        # Reading the image was a call of its own.
        costs = replace(first.costs, forward_calls=first.costs.forward_calls + bool(block))
        return [replace(first, costs=costs), *others]

    def _conversation(self, request: Request) -> Conversation[Answer]:
        tokenizer, turns = self._tokenizer, list[Turn]()
        semantic, spatial = request.semantic, request.spatial
        if semantic is None:
            turn = yield Ask(
                "semantic",
                request.ids,
                tokenizer.semantic_constraint,
                afresh=True,
                draft=self._draft(request.expression),
                onward=tuple(tokenizer.between_stages) if spatial is None else (),
            )
            assert turn is not None
            turns.append(turn)
            semantic, before = tokenizer.semantic(turn.tokens), turn.unread
            if spatial is not None:
                semantic = replace(semantic, count=min(spatial.count, MAX_TARGETS))
        else:
            # The first turn was given: its text is read as if the model had written it.
            before = (*request.ids, *tokenizer.encode(semantic.text))
        if spatial is None and semantic.is_none:
            spatial = SpatialPrompt.empty()
        if spatial is None:
            constraint = tokenizer.spatial_constraint(semantic.count)
            first = turns[0].ahead if turns else None
            prompt = (*before, *tokenizer.between_stages) if first is None else ()
            turn = yield Ask("spatial", prompt, constraint, afresh=not turns, first=first)
            assert turn is not None
            turns.append(turn)
            spatial = tokenizer.spatial(turn.tokens, self._size).distinct()
        return Answer(semantic, spatial, _costs(turns))

    def _read(self, context: Context, ask: Ask) -> Turn:
        if not ask.afresh:
            return generate(context, ask.tokens, ask.constraint, draft=ask.draft, first=ask.first)
        prompt, features = self._from_image(context, ask.tokens)
        return generate(
            context,
            prompt,
            ask.constraint,
            features=features,
            meanwhile=self._meanwhile,
            draft=ask.draft,
            onward=ask.onward,
        )

    def _draft(self, expression: str) -> tuple[int, ...]:
        """A guess at stage 1's answer, () where the bundle has no glossary."""
        glossary = self._bundle.glossary
        return tuple(self._tokenizer.encode(glossary.draft(expression))) if glossary else ()

    def _ready(self, request: Request, watch: Stopwatch) -> Context:
        """A context with room for both turns; the image's features are there."""
        if self._features is None:
            with watch.stage("vision"):
                self._features = self._mllm.encode_image(self._patches(), **self._sized)
        need = min(self._longest(request), self._bundle.manifest.shapes.max_length)
        if self._context is None or self._context.capacity < need:
            self._context = self._mllm.open(need, prefix=self._prefix[: self._before], **self._sized)
        return self._context

    def _longest(self, request: Request) -> int:
        """Tokens of the longest conversation that ``request`` can lead to."""
        tokenizer, semantic = self._tokenizer, request.semantic
        given = 0 if semantic is None else len(tokenizer.encode(semantic.text))
        written = given or tokenizer.semantic_constraint.max_tokens
        located = tokenizer.spatial_constraint(MAX_TARGETS).max_tokens
        # A wrong guess at stage 1's answer is no longer than the answer may be, and forgotten before stage 2.
        return len(self._prefix) + len(request.ids) + written + len(tokenizer.between_stages) + located

    def _from_image(self, context: Context, ids: tuple[int, ...]) -> tuple[list[int], Features | None]:
        """Back to the end of the image, or to the text before it if the cache does not hold the image yet."""
        holds = context.length >= len(self._prefix)
        context.truncate(len(self._prefix) if holds else self._before)
        return [*self._prefix[context.length :], *ids], None if holds else self._features

    def _patches(self) -> Float32Array:
        return image_patches(self._image, self._size, self._bundle.config.mllm)


def _costs(turns: list[Turn]) -> Costs:
    return Costs(
        sum(len(turn.tokens) for turn in turns),
        sum(turn.forward_calls for turn in turns),
        sum(turn.reused_tokens for turn in turns),
        sum(turn.drafted for turn in turns),
        sum(turn.accepted for turn in turns),
    )
