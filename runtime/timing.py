"""Stage timings: what the caller waited for, and what the engine was at work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

STAGES = ("image", "vision", "semantic", "spatial", "encoder", "decoder", "masks")
"""In order: read and resize; vision tower; stage 1; stage 2; segmenter's image encoder; mask decoder; masks
at the original size."""


@dataclass(frozen=True)
class Timing:
    """Seconds. ``wall`` is what the caller waited, ``device`` what the work took wherever it ran.

    They differ for what runs beside something else: the segmenter's encoder has little ``wall`` left when the
    MLLM has finished.
    """

    wall: float
    device: float


@dataclass
class Stopwatch:
    """Collects stage timings of one expression; a stage met twice adds up."""

    stages: dict[str, Timing] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body as wall and device alike."""
        start = time.perf_counter()
        yield
        taken = time.perf_counter() - start
        self.add(name, taken, taken)

    def add(self, name: str, wall: float, device: float) -> None:
        before = self.stages.get(name, Timing(0.0, 0.0))
        self.stages[name] = Timing(before.wall + wall, before.device + device)

    def finish(self) -> dict[str, Timing]:
        """All stages in order, and ``total``, their sum."""
        ordered = {name: self.stages[name] for name in STAGES if name in self.stages}
        total = Timing(sum(t.wall for t in ordered.values()), sum(t.device for t in ordered.values()))
        return {**ordered, "total": total}
