"""Figures of the latency benchmark's rows, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from benchmarks.timing import Spread
from benchmarks.worker import PLAIN, Run
from benchmarks.workers import Row
from ppcr import masks
from runtime.timing import STAGES

TOLERATED_LOSS = 0.02
"""A row whose mean IoU lies further than this under plain torch's has no speed-up to speak of."""


@dataclass(frozen=True)
class RowFigures:
    """One system at one number of threads.

    Attributes:
        end_to_end: image and first expression to masks. cpu_p50_s: median processor time of it, all threads.
        second: a further expression of the same image; None for plain torch, to which all are alike.
        stages: what the caller waited for each, over the runs that had it. device: median seconds at work.
        tokens, forward_calls: of the MLLM, mean of first expressions. drafted: tokens guessed, likewise;
            accepted: share of those that were right, None where nothing was guessed.
        mean_mask_iou: with the truth. agreement: mean IoU with plain torch on the same expressions. Both None
            for weights that say nothing.
        speedup: of plain torch's median over this one's. counts: accuracy is not worse (`TOLERATED_LOSS`).
            Both without meaning where plain torch was not run: None and True.
        engine: what really ran, as the runtime says it.
    """

    system: str
    threads: int
    end_to_end: Spread
    cpu_p50_s: float
    second: Spread | None
    stages: dict[str, Spread]
    device: dict[str, float]
    tokens: float
    forward_calls: float
    drafted: float
    accepted: float | None
    mean_mask_iou: float | None
    agreement: float | None
    peak_memory_mb: float
    loaded_s: float
    speedup: float | None
    counts: bool
    engine: dict[str, Any]

    @property
    def second_speedup(self) -> float | None:
        """Median of first expressions over that of second ones."""
        return None if self.second is None else self.end_to_end.p50 / self.second.p50

    def to_json(self) -> dict[str, Any]:
        """JSON values, times in seconds."""
        return {
            "system": self.system,
            "threads": self.threads,
            "engine": self.engine.get("engine"),
            "precision": self.engine.get("precision"),
            "end_to_end": self.end_to_end.to_json(),
            "cpu_p50_s": round(self.cpu_p50_s, 6),
            "second_expression": None if self.second is None else self.second.to_json(),
            "stages": self.stages_json(),
            "tokens": round(self.tokens, 2),
            "forward_calls": round(self.forward_calls, 2),
            "drafted_tokens": round(self.drafted, 2),
            "accepted_share": _rounded(self.accepted, 4),
            "mean_mask_iou": _rounded(self.mean_mask_iou, 5),
            "agreement": _rounded(self.agreement, 5),
            "peak_memory_mb": round(self.peak_memory_mb, 1),
            "load_s": round(self.loaded_s, 4),
            "speedup": _rounded(self.speedup, 3),
            "speedup_counts": self.counts,
        }

    def stages_json(self) -> dict[str, dict[str, float | int]]:
        """Percentiles of each stage, and its median at work."""
        return {
            name: {**spread.to_json(), "device_p50_s": round(self.device[name], 6)}
            for name, spread in self.stages.items()
        }


def figures(rows: Sequence[Row], *, judged: bool = True) -> list[RowFigures]:
    """Figures of rows that were measured together, plain torch's among them or not.

    judged: whether masks mean something; False for random weights.
    """
    plain = next((row for row in rows if row.task.system == PLAIN), None)
    reference = {} if plain is None else dict(plain.first)
    plain_p50 = None if plain is None else Spread.of([run.seconds for _, run in plain.first]).p50
    plain_iou = 0.0 if plain is None else fmean(run.iou for _, run in plain.first)
    made = []
    for row in rows:
        first = [run for _, run in row.first]
        spread = Spread.of([run.seconds for run in first])
        names = [name for name in STAGES if any(name in run.stages for run in first)]
        iou = fmean(run.iou for run in first)
        made.append(
            RowFigures(
                system=row.task.system,
                threads=row.task.threads,
                end_to_end=spread,
                cpu_p50_s=Spread.of([run.cpu for run in first]).p50,
                second=Spread.of([run.seconds for _, run in row.second]) if row.second else None,
                stages={n: Spread.of([run.stages[n] for run in first if n in run.stages]) for n in names},
                device={n: Spread.of([run.device[n] for run in first if n in run.device]).p50 for n in names},
                tokens=fmean(run.tokens for run in first),
                forward_calls=fmean(run.forward_calls for run in first),
                drafted=fmean(run.drafted for run in first),
                accepted=_share(sum(run.accepted for run in first), sum(run.drafted for run in first)),
                mean_mask_iou=iou if judged else None,
                agreement=(
                    fmean(_agree(run, reference[key]) for key, run in row.first)
                    if judged and reference
                    else None
                ),
                peak_memory_mb=row.peak_memory_mb,
                loaded_s=row.loaded_s,
                speedup=None if plain_p50 is None else plain_p50 / spread.p50,
                counts=not judged or iou >= plain_iou - TOLERATED_LOSS,
                engine=row.engine,
            )
        )
    return made


def table(rows: Sequence[RowFigures]) -> list[str]:
    """Rows of one number of threads: the whole, then stage by stage."""
    wide = max(8, 2 + max(len(row.system) for row in rows))
    lines = [
        f"threads: {rows[0].threads}",
        f"{'':<{wide}}{'p50 ms':>9}{'p90':>9}{'p99':>9}{'cpu':>9}{'second':>9}{'speed-up':>10}"
        f"{'tokens':>8}{'drafted':>9}{'right %':>9}{'calls':>7}{'mIoU %':>8}{'agree %':>9}{'peak MB':>9}"
        f"{'load s':>8}",
    ]
    for row in rows:
        second = "-" if row.second is None else f"{1e3 * row.second.p50:.1f}"
        # A speed-up does not count while correctness is red.
        factor = shown(row.speedup, ".2f", "x") if row.counts else "wrong"
        lines.append(
            f"{row.system:<{wide}}{1e3 * row.end_to_end.p50:>9.1f}{1e3 * row.end_to_end.p90:>9.1f}"
            f"{1e3 * row.end_to_end.p99:>9.1f}{1e3 * row.cpu_p50_s:>9.1f}{second:>9}{factor:>10}"
            f"{row.tokens:>8.1f}{row.drafted:>9.1f}{percent(row.accepted):>9}{row.forward_calls:>7.1f}"
            f"{percent(row.mean_mask_iou):>8}"
            f"{percent(row.agreement):>9}{row.peak_memory_mb:>9.0f}{row.loaded_s:>8.2f}"
        )
    columns = "".join(f"{row.system:>28}" for row in rows)
    lines += ["stage, ms: p50 / p90 / p99 waited", f"{'':<10}{columns}"]
    for name in STAGES:
        if any(name in row.stages for row in rows):
            lines.append(f"  {name:<8}" + "".join(f"{_cell(row.stages.get(name)):>28}" for row in rows))
    return lines


def cold_line(cold: dict[str, Any], precision: str, threads: int) -> str:
    """The cold start in one line."""
    torch = "loaded (it must not be)" if cold["torch_loaded"] else "not loaded"
    return (
        f"cold start ({precision}, threads: {threads}, fresh process, median of {cold['processes']}): "
        f"{cold['total_s']:.2f} s from process to mask (import {cold['import_s']:.2f}, load "
        f"{cold['load_s']:.2f}, image to mask {cold['first_mask_s']:.2f}); torch: {torch}"
    )


def summary(
    rows: Sequence[RowFigures], cold: dict[str, Any] | None, system: str, threads: int
) -> dict[str, Any]:
    """The last line: the row called ``system`` at ``threads`` in full, every other row in short."""
    by_name = {(row.system, row.threads): row for row in rows}
    row, plain = by_name[system, threads], by_name.get((PLAIN, threads))
    per_thread: dict[str, dict[str, Any]] = {}
    for one in rows:
        second = one.second_speedup
        per_thread.setdefault(str(one.threads), {})[one.system] = {
            "end_to_end_p50_s": round(one.end_to_end.p50, 6),
            "end_to_end_p99_s": round(one.end_to_end.p99, 6),
            "cpu_p50_s": round(one.cpu_p50_s, 6),
            "engine": one.engine.get("engine"),
            "precision": one.engine.get("precision"),
            "speedup": _rounded(one.speedup, 3),
            "second_expression_speedup": _rounded(second, 3),
            "mean_mask_iou": _rounded(one.mean_mask_iou, 5),
            "agreement": _rounded(one.agreement, 5),
            "peak_memory_mb": round(one.peak_memory_mb, 1),
        }
    told = row.to_json()
    second = row.second_speedup
    return {
        "benchmark": "latency",
        "system": system,
        "engine": row.engine.get("engine"),
        "precision": row.engine.get("precision"),
        "threads": threads,
        "stages": told["stages"],
        "end_to_end_p50_s": round(row.end_to_end.p50, 6),
        "end_to_end_p90_s": round(row.end_to_end.p90, 6),
        "end_to_end_p99_s": round(row.end_to_end.p99, 6),
        "plain_torch_p50_s": None if plain is None else round(plain.end_to_end.p50, 6),
        "speedup": told["speedup"],
        "speedup_counts": row.counts,
        "second_expression_p50_s": None if row.second is None else round(row.second.p50, 6),
        "second_expression_speedup": _rounded(second, 3),
        "mean_mask_iou": told["mean_mask_iou"],
        "plain_torch_mean_mask_iou": None if plain is None else _rounded(plain.mean_mask_iou, 5),
        "agreement": told["agreement"],
        "peak_memory_mb": told["peak_memory_mb"],
        "plain_torch_peak_memory_mb": None if plain is None else round(plain.peak_memory_mb, 1),
        "tokens": told["tokens"],
        "forward_calls": told["forward_calls"],
        "drafted_tokens": told["drafted_tokens"],
        "accepted_share": told["accepted_share"],
        "cold_start": cold,
        "by_threads": per_thread,
    }


def raw(rows: Sequence[Row], names: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Every timed run, a flat record each, for the CSV file. names: instead of the systems' own."""
    known = names or {}
    return [
        {
            "system": known.get(row.task.system, row.task.system),
            "engine": row.engine.get("engine"),
            "precision": row.engine.get("precision"),
            "threads": row.task.threads,
            "image": image,
            "expression": place,
            "asked": asked,
            "seconds": round(run.seconds, 6),
            "cpu_s": round(run.cpu, 6),
            **{f"{stage}_s": _rounded(run.stages.get(stage), 6) for stage in STAGES},
            **{f"{stage}_device_s": _rounded(run.device.get(stage), 6) for stage in STAGES},
            "tokens": run.tokens,
            "forward_calls": run.forward_calls,
            "drafted_tokens": run.drafted,
            "accepted_tokens": run.accepted,
            "iou": round(run.iou, 5),
        }
        for row in rows
        for asked, runs in (("first", row.first), ("second", row.second))
        for (image, place), run in runs
    ]


def shown(value: float | None, form: str, unit: str = "") -> str:
    """A number as text, "-" for None."""
    return "-" if value is None else f"{value:{form}}{unit}"


def percent(value: float | None) -> str:
    """A share in per cent with two digits, "-" for None."""
    return "-" if value is None else f"{100 * value:.2f}"


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _cell(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return " / ".join(f"{1e3 * value:.2f}" for value in (spread.p50, spread.p90, spread.p99))


def _agree(run: Run, other: Run) -> float:
    return masks.iou(masks.decode_rle(run.mask), masks.decode_rle(other.mask))
