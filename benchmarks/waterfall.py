"""From the plain torch pipeline to the fastest engine, one step at a time, each with its accuracy.

Every step keeps what the one before it had. Steps that need a GPU are listed, not run, where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.report import percent
from benchmarks.rows import RowPlan
from benchmarks.timing import Spread
from benchmarks.worker import ENGINE, FORCED, PLAIN, REUSED, Task
from benchmarks.workers import Row, measure_rows

EXPRESSIONS = 4
"""Expressions asked about each image."""
NOT_RUN, ALONE = "needs a GPU, not run", "needs a second thread, not run"

_BESIDE = "+ encoder beside the MLLM"


@dataclass(frozen=True)
class Step:
    """One row: what was added, and the task that runs it; None where it cannot run here: why not."""

    name: str
    task: Task | None
    missing: str = ""


@dataclass(frozen=True)
class StepFigures:
    """A step, measured.

    Attributes:
        first: image and first expression to masks; None where all expressions go in one call.
        each: seconds per expression of an image with `EXPRESSIONS` of them.
        mean_mask_iou: over all expressions; None for weights that say nothing.
    """

    name: str
    first: Spread | None
    each: Spread
    forward_calls: float
    mean_mask_iou: float | None
    peak_memory_mb: float
    engine: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        iou = self.mean_mask_iou
        return {
            "step": self.name,
            "first": None if self.first is None else self.first.to_json(),
            "each": self.each.to_json(),
            "forward_calls": round(self.forward_calls, 2),
            "mean_mask_iou": None if iou is None else round(iou, 5),
            "peak_memory_mb": round(self.peak_memory_mb, 1),
            "engine": self.engine.get("engine"),
            "precision": self.engine.get("precision"),
        }


def steps(
    bundle: Path, checkpoint: Path, rows: Sequence[RowPlan], examples: Path, threads: int, *, fixed: bool
) -> list[Step]:
    """The steps for the engine of ``rows[0]`` at its precision; the others are the precisions at the end.

    Everything is on a GPU where that engine is. With one thread nothing runs beside the MLLM.
    """
    first, *others = rows
    device = "cuda" if first.on_gpu else "cpu"
    common: dict[str, Any] = {
        "examples": str(examples), "threads": threads, "fixed": fixed, "device": device,
        "checkpoint": str(checkpoint),
    }  # fmt: skip
    torch = Task("", str(bundle), **common, overlap=False)
    engine = Task("", str(bundle), **common, engine=first.engine, precision=first.precision, kind=ENGINE)
    listed = [
        Step("plain torch", replace(torch, kind=PLAIN, source=str(checkpoint))),
        Step("+ KV cache kept", replace(torch, kind=REUSED)),
        Step("+ forced literals", replace(torch, kind=FORCED)),
        Step(f"+ static cache, graph: {first.name}", replace(engine, overlap=False, drafts=False)),
        Step("+ stage 1 guessed and checked", replace(engine, overlap=False)),
        Step(_BESIDE, engine) if threads > 1 else Step(_BESIDE, None, ALONE),
        Step("+ expressions in one call", replace(engine, together=True)),
        *(
            Step(f"+ {row.name}", replace(engine, engine=row.engine, precision=row.precision, together=True))
            for row in others
        ),
    ]
    if not first.on_gpu:
        listed.insert(4, Step("+ CUDA graph of the step", None, NOT_RUN))
        listed.append(Step("+ fp16, bf16 or fp8 on a GPU", None, NOT_RUN))
    return [
        step if step.task is None else Step(step.name, replace(step.task, system=f"step {number}"))
        for number, step in enumerate(listed)
    ]


def measure(
    listed: Sequence[Step], images: int, repeats: int, folder: Path, *, judged: bool, apart: bool
) -> tuple[list[StepFigures], list[Row], dict[str, str]]:
    """Figures of the steps that run here, their rows, and why others could not be loaded."""
    tasks = [step.task for step in listed if step.task is not None]
    measured = measure_rows(
        tasks,
        images,
        repeats,
        folder,
        expressions=EXPRESSIONS,
        optional=True,
        apart=apart,
        plain_once=False,  # accuracy is of the same expressions in every row
    )
    known = names(listed)
    found = [figures(known[row.task.system], row, judged=judged) for row in measured.rows]
    return found, measured.rows, {known[name]: told for name, told in measured.left_out.items()}


def names(listed: Sequence[Step]) -> dict[str, str]:
    """The step's name by its task's."""
    return {step.task.system: step.name for step in listed if step.task is not None}


def figures(name: str, row: Row, *, judged: bool = True) -> StepFigures:
    """Figures of one row, whose images had equally many expressions each."""
    runs = [run for _, run in (*row.first, *row.second)]
    return StepFigures(
        name,
        None if row.task.together else Spread.of([run.seconds for _, run in row.first]),
        Spread.of(list(_each(row))),
        fmean(run.forward_calls for run in runs),
        fmean(run.iou for run in runs) if judged else None,
        row.peak_memory_mb,
        row.engine,
    )


def _each(row: Row) -> Iterator[float]:
    further = len(row.second) // len(row.first)
    for turn, (_, run) in enumerate(row.first):
        rest = row.second[turn * further : (turn + 1) * further]
        yield (run.seconds + sum(one.seconds for _, one in rest)) / (1 + further)


def table(listed: Sequence[Step], found: Sequence[StepFigures], left_out: dict[str, str]) -> list[str]:
    """A line for each step, in order."""
    by_name = {one.name: one for one in found}
    plain = found[0]
    threads = next(step.task.threads for step in listed if step.task is not None)
    wide = max(len(step.name) for step in listed) + 2
    lines = [
        f"waterfall (threads: {threads}; each: per expression of an image with {EXPRESSIONS})",
        f"{'':<{wide}}{'first ms':>10}{'faster':>8}{'each ms':>10}{'faster':>8}{'calls':>7}{'mIoU %':>8}"
        f"{'peak MB':>9}",
    ]
    for step in listed:
        one = by_name.get(step.name)
        if one is None:
            lines.append(f"{step.name:<{wide}}  {left_out.get(step.name, step.missing)}")
            continue
        first = f"{'-':>10}{'-':>8}"
        if one.first is not None and plain.first is not None:
            first = f"{1e3 * one.first.p50:>10.1f}{plain.first.p50 / one.first.p50:>7.2f}x"
        lines.append(
            f"{step.name:<{wide}}{first}{1e3 * one.each.p50:>10.1f}{plain.each.p50 / one.each.p50:>7.2f}x"
            f"{one.forward_calls:>7.1f}{percent(one.mean_mask_iou):>8}{one.peak_memory_mb:>9.0f}"
        )
    return lines


def to_json(
    listed: Sequence[Step], found: Sequence[StepFigures], left_out: dict[str, str]
) -> list[dict[str, Any]]:
    """All steps in order; those that were not run with the reason."""
    by_name = {one.name: one.to_json() for one in found}
    return [
        by_name.get(step.name, {"step": step.name, "not_run": left_out.get(step.name, step.missing)})
        for step in listed
    ]
