"""Many expressions of one image: each as a call of its own, on one scene that is kept, all in one call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.report import percent
from benchmarks.timing import Spread
from benchmarks.worker import Run, Task
from benchmarks.workers import Worker

SEPARATE, KEPT, TOGETHER = "separate calls", "one scene", "one call"
MAX_IMAGES = 8


@dataclass(frozen=True)
class Throughput:
    """One way to ask ``expressions`` about an image.

    Attributes:
        seconds: from the image to the last mask. mean_mask_iou: None for weights that say nothing.
    """

    way: str
    expressions: int
    seconds: Spread
    mean_mask_iou: float | None
    peak_memory_mb: float

    @property
    def rate(self) -> float:
        """Expressions a second, by the median."""
        return self.expressions / self.seconds.p50

    def to_json(self) -> dict[str, Any]:
        iou = self.mean_mask_iou
        return {
            "seconds": self.seconds.to_json(),
            "expressions_per_s": round(self.rate, 3),
            "mean_mask_iou": None if iou is None else round(iou, 5),
            "peak_memory_mb": round(self.peak_memory_mb, 1),
        }


def measure(
    task: Task, expressions: int, images: int, repeats: int, folder: Path, *, judged: bool = True
) -> list[Throughput]:
    """The three ways on the system of ``task``, each in a fresh process, taking turns image by image."""
    tasks = {way: replace(task, system=way, together=way == TOGETHER) for way in (SEPARATE, KEPT, TOGETHER)}
    places = range(expressions)
    seconds: dict[str, list[float]] = {way: [] for way in tasks}
    ious: dict[str, list[float]] = {way: [] for way in tasks}
    peaks: dict[str, float] = {}
    with ExitStack() as stack:
        workers = {way: stack.enter_context(Worker(one, folder)) for way, one in tasks.items()}
        for worker in workers.values():
            worker.loaded()
        for turn in range(images * repeats + 1):  # the first is a warm-up
            for way, worker in workers.items():
                image = turn % images
                runs, peaks[way] = _ask(worker, way, image, places)
                if turn:
                    seconds[way].append(sum(run.seconds for run in runs))
                    ious[way].append(fmean(run.iou for run in runs))
    return [
        Throughput(
            way, expressions, Spread.of(seconds[way]), fmean(ious[way]) if judged else None, peaks[way]
        )
        for way in tasks
    ]


def _ask(worker: Worker, way: str, image: int, places: Sequence[int]) -> tuple[list[Run], float]:
    if way != SEPARATE:
        return worker.ask(image, places)
    runs, peak = list[Run](), 0.0
    for place in places:
        found, peak = worker.ask(image, (place,))
        runs += found
    return runs, peak


def table(system: str, threads: int, found: Sequence[Throughput]) -> list[str]:
    """A line for each way."""
    first = found[0]
    lines = [
        f"{first.expressions} expressions on one image ({system}, threads: {threads})",
        f"{'':<16}{'image ms':>10}{'p90':>9}{'each ms':>9}{'per s':>8}{'against':>9}"
        f"{'mIoU %':>8}{'peak MB':>9}",
    ]
    for one in found:
        lines.append(
            f"{one.way:<16}{1e3 * one.seconds.p50:>10.1f}{1e3 * one.seconds.p90:>9.1f}"
            f"{1e3 * one.seconds.p50 / one.expressions:>9.1f}{one.rate:>8.1f}{one.rate / first.rate:>8.2f}x"
            f"{percent(one.mean_mask_iou):>8}{one.peak_memory_mb:>9.0f}"
        )
    return lines


def to_json(system: str, threads: int, found: Sequence[Throughput]) -> dict[str, Any]:
    """The ways, and how many times the throughput of separate calls one call has."""
    by_way = {one.way: one for one in found}
    return {
        "system": system,
        "threads": threads,
        "expressions": found[0].expressions,
        "ways": {one.way: one.to_json() for one in found},
        "throughput_gain": round(by_way[TOGETHER].rate / by_way[SEPARATE].rate, 3),
    }
