"""The one timing helper of benchmarks and tests: percentiles, and a function timed after warm-up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """Percentiles of n durations, in seconds."""

    p50: float
    p90: float
    p99: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Percentiles of ``seconds``. Raises ValueError when there are none."""
        if not seconds:
            raise ValueError("no durations: nothing was timed")
        p50, p90, p99 = np.percentile(np.asarray(seconds, np.float64), (50, 90, 99)).tolist()
        return cls(p50, p90, p99, len(seconds))

    def to_json(self) -> dict[str, float | int]:
        """Seconds, rounded to the microsecond."""
        return {
            "p50_s": round(self.p50, 6),
            "p90_s": round(self.p90, 6),
            "p99_s": round(self.p99, 6),
            "n": self.n,
        }


def measure(body: Callable[[], object], *, warmup: int = 2, repeats: int = 10) -> Spread:
    """Time ``repeats`` calls of ``body`` after ``warmup`` calls that do not count."""
    for _ in range(warmup):
        body()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        body()
        seconds.append(time.perf_counter() - start)
    return Spread.of(seconds)
