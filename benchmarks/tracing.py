"""One request with the place of every engine call on the clock: sessions that note what they are asked.

The runtime's own timings (`runtime.timing`) say how long each stage took; what runs beside what is seen only
from where the calls lie. A trace is a run of its own: rows that are timed do not carry the recorder.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ppcr.constraint import Constraint
from runtime.generation import Turn
from runtime.pipeline import Pipeline
from runtime.session import (
    Context,
    Features,
    Float32Array,
    MLLMSession,
    Prompts,
    SegmenterSession,
    TurnContext,
    VerifyingContext,
)

MLLM, ENCODER, HOST = "MLLM", "image encoder", "mask decoder and host"
STREAMS = (MLLM, ENCODER, HOST)


@dataclass(frozen=True)
class Event:
    """One call of an engine, or work of the host.

    Attributes:
        stream: one of STREAMS. stage: of `runtime.timing.STAGES`; "open" for the start of a conversation.
        start, end: seconds since the image was opened.
        calls, tokens: forward calls of the MLLM in it, and tokens they read or wrote.
    """

    stream: str
    stage: str
    start: float
    end: float
    calls: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Trace:
    """One image and one expression.

    Attributes:
        seconds: until the masks. events: in the order of their starts.
        wall, device: seconds of each stage as the runtime gives them: waited for, and at work.
    """

    seconds: float
    events: tuple[Event, ...]
    wall: dict[str, float]
    device: dict[str, float]

    def calls(self, stage: str) -> int:
        """Forward calls of the MLLM in a stage."""
        return sum(event.calls for event in self.events if event.stage == stage)

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Trace:
        return cls(**{**value, "events": tuple(Event(**event) for event in value["events"])})


@dataclass
class Recorder:
    """Collects events from any thread; seconds count from when it was made."""

    events: list[Event] = field(default_factory=list)
    _start: float = field(default_factory=time.perf_counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def now(self) -> float:
        return time.perf_counter() - self._start

    def add(self, event: Event) -> None:
        with self._lock:
            self.events.append(event)

    @contextmanager
    def event(self, stream: str, stage: str, *, calls: int = 0, tokens: int = 0) -> Iterator[None]:
        """Note the body."""
        start = self.now
        yield
        self.add(Event(stream, stage, start, self.now, calls, tokens))


class RecordedContext:
    """`runtime.session.Context`. The second stage begins with the block that has its request in it."""

    def __init__(self, inner: Context, recorder: Recorder, request: Sequence[int]) -> None:
        self._inner, self._recorder = inner, recorder
        self._request, self._stage = list(request), "semantic"

    @property
    def length(self) -> int:
        return self._inner.length

    @property
    def capacity(self) -> int:
        return self._inner.capacity

    def extend(self, token_ids: Sequence[int], features: Features | None = None) -> Float32Array:
        stage = self._stage_of(token_ids)
        with self._recorder.event(MLLM, stage, calls=1, tokens=len(token_ids)):
            return self._inner.extend(token_ids, features)

    @property
    def can_verify(self) -> bool:
        return isinstance(self._inner, VerifyingContext) and self._inner.can_verify

    def verify(
        self, token_ids: Sequence[int], guesses: int, features: Features | None = None
    ) -> Float32Array:
        """A guess is of the first stage, and may have the request of the second after it."""
        with self._recorder.event(MLLM, "semantic", calls=1, tokens=len(token_ids)):
            logits = cast(VerifyingContext, self._inner).verify(token_ids, guesses, features)
        self._stage_of(token_ids)
        return logits

    def truncate(self, length: int) -> None:
        if length < self._inner.length:  # the guess was wrong: the request has yet to come
            self._stage = "semantic"
        self._inner.truncate(length)

    def _stage_of(self, token_ids: Sequence[int]) -> str:
        ids, request = list(token_ids), self._request
        if any(ids[at : at + len(request)] == request for at in range(len(ids) - len(request) + 1)):
            self._stage = "spatial"
        return self._stage


class RecordedTurns(RecordedContext):
    """`runtime.session.TurnContext`: an engine that answers whole turns."""

    def answer(
        self,
        prompt: Sequence[int],
        constraint: Constraint,
        *,
        features: Features | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Turn:
        stage, start = self._stage_of(prompt), self._recorder.now
        answer = cast(TurnContext, self._inner).answer
        turn = answer(prompt, constraint, features=features, meanwhile=meanwhile)
        event = Event(MLLM, stage, start, self._recorder.now, turn.forward_calls, len(turn.tokens))
        self._recorder.add(event)
        return turn


class RecordedMLLM:
    """`runtime.session.MLLMSession`."""

    def __init__(self, inner: MLLMSession, recorder: Recorder, request: Sequence[int]) -> None:
        self._inner, self._recorder, self._request = inner, recorder, request

    def encode_image(self, patches: Float32Array, **sized: Any) -> Features:
        with self._recorder.event(MLLM, "vision"):
            return self._inner.encode_image(patches, **sized)

    def open(self, max_length: int | None = None, **about: Any) -> Context:
        with self._recorder.event(MLLM, "open"):
            context = self._inner.open(max_length, **about)
        kind: Any = RecordedTurns if isinstance(context, TurnContext) else RecordedContext
        made: Context = kind(context, self._recorder, self._request)
        return made


class RecordedSegmenter:
    """`runtime.session.SegmenterSession`."""

    def __init__(self, inner: SegmenterSession, recorder: Recorder) -> None:
        self._inner, self._recorder = inner, recorder

    def encode(self, pixels: Float32Array) -> Features:
        with self._recorder.event(ENCODER, "encoder"):
            return self._inner.encode(pixels)

    def decode(self, features: Features, prompts: Prompts) -> tuple[Float32Array, Float32Array]:
        with self._recorder.event(HOST, "decoder"):
            return self._inner.decode(features, prompts)


def trace(pipeline: Pipeline, image: npt.NDArray[np.uint8], expression: str) -> Trace:
    """Answer ``expression`` about ``image`` on the sessions of ``pipeline``, taking notes."""
    recorder = Recorder()
    sessions = pipeline.sessions
    request = pipeline.bundle.tokenizer.between_stages
    noted = replace(
        sessions,
        mllm=RecordedMLLM(sessions.mllm, recorder, request),
        segmenter=RecordedSegmenter(sessions.segmenter, recorder),
    )
    shadow = Pipeline(pipeline.bundle, noted, threads=pipeline.threads, engine=str(pipeline.engine["engine"]))
    if pipeline.background is None:
        shadow.background = None
    with shadow:
        start = recorder.now
        result = shadow.open(image).segment(expression)
        seconds = recorder.now - start
    stages = {name: timing for name, timing in result.timings.items() if name != "total"}
    wall = {name: timing.wall for name, timing in stages.items()}
    events = placed(recorder.events, wall, start)
    return Trace(seconds, events, wall, {name: timing.device for name, timing in stages.items()})


def placed(events: Sequence[Event], wall: dict[str, float], start: float) -> tuple[Event, ...]:
    """Events counted from ``start``, and the host's own work beside them.

    Reading the image comes first; the masks follow the last call of an engine.
    """
    moved = [replace(event, start=event.start - start, end=event.end - start) for event in events]
    last = max((event.end for event in moved), default=wall.get("image", 0.0))
    host = [("image", 0.0), ("masks", last)]
    added = [Event(HOST, stage, at, at + wall[stage]) for stage, at in host if stage in wall]
    return tuple(sorted([*moved, *added], key=lambda event: event.start))
