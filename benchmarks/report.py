"""Figures of the latency benchmark's rows, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
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
        tokens, forward_calls: of the MLLM, mean of first expressions.
        mean_mask_iou: with the truth. agreement: mean IoU with plain torch on the same expressions.
        speedup: of plain torch's median over this one's. counts: accuracy is not worse (`TOLERATED_LOSS`).
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
    mean_mask_iou: float
    agreement: float
    peak_memory_mb: float
    loaded_s: float
    speedup: float
    counts: bool

    @property
    def second_speedup(self) -> float | None:
        """Median of first expressions over that of second ones."""
        return None if self.second is None else self.end_to_end.p50 / self.second.p50

    def to_json(self) -> dict[str, Any]:
        """JSON values, times in seconds."""
        return {
            "system": self.system,
            "threads": self.threads,
            "end_to_end": self.end_to_end.to_json(),
            "cpu_p50_s": round(self.cpu_p50_s, 6),
            "second_expression": None if self.second is None else self.second.to_json(),
            "stages": self.stages_json(),
            "tokens": round(self.tokens, 2),
            "forward_calls": round(self.forward_calls, 2),
            "mean_mask_iou": round(self.mean_mask_iou, 5),
            "agreement": round(self.agreement, 5),
            "peak_memory_mb": round(self.peak_memory_mb, 1),
            "load_s": round(self.loaded_s, 4),
            "speedup": round(self.speedup, 3),
            "speedup_counts": self.counts,
        }

    def stages_json(self) -> dict[str, dict[str, float | int]]:
        """Percentiles of each stage, and its median at work."""
        return {
            name: {**spread.to_json(), "device_p50_s": round(self.device[name], 6)}
            for name, spread in self.stages.items()
        }


def figures(rows: Sequence[Row]) -> list[RowFigures]:
    """Figures of rows that were measured together, one of them plain torch's."""
    plain = next(row for row in rows if row.task.system == PLAIN)
    reference = dict(plain.first)
    plain_p50 = Spread.of([run.seconds for _, run in plain.first]).p50
    plain_iou = fmean(run.iou for _, run in plain.first)
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
                mean_mask_iou=iou,
                agreement=fmean(_agree(run, reference[key]) for key, run in row.first),
                peak_memory_mb=row.peak_memory_mb,
                loaded_s=row.loaded_s,
                speedup=plain_p50 / spread.p50,
                counts=iou >= plain_iou - TOLERATED_LOSS,
            )
        )
    return made


def table(rows: Sequence[RowFigures]) -> list[str]:
    """Rows of one number of threads: the whole, then stage by stage."""
    lines = [
        f"threads: {rows[0].threads}",
        f"{'':<8}{'p50 ms':>9}{'p90':>9}{'p99':>9}{'cpu':>9}{'second':>9}{'speed-up':>10}"
        f"{'tokens':>8}{'calls':>7}{'mIoU %':>8}{'agree %':>9}{'peak MB':>9}{'load s':>8}",
    ]
    for row in rows:
        second = "-" if row.second is None else f"{1e3 * row.second.p50:.1f}"
        # A speed-up does not count while correctness is red.
        factor = f"{row.speedup:.2f}x" if row.counts else "wrong"
        lines.append(
            f"{row.system:<8}{1e3 * row.end_to_end.p50:>9.1f}{1e3 * row.end_to_end.p90:>9.1f}"
            f"{1e3 * row.end_to_end.p99:>9.1f}{1e3 * row.cpu_p50_s:>9.1f}{second:>9}{factor:>10}"
            f"{row.tokens:>8.1f}{row.forward_calls:>7.1f}{100 * row.mean_mask_iou:>8.2f}"
            f"{100 * row.agreement:>9.2f}{row.peak_memory_mb:>9.0f}{row.loaded_s:>8.2f}"
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


def summary(rows: Sequence[RowFigures], cold: dict[str, Any], precision: str, threads: int) -> dict[str, Any]:
    """The last line: the row of ``precision`` and ``threads`` in full, every other row in short."""
    by_name = {(row.system, row.threads): row for row in rows}
    row, plain = by_name[precision, threads], by_name[PLAIN, threads]
    per_thread: dict[str, dict[str, Any]] = {}
    for one in rows:
        second = one.second_speedup
        per_thread.setdefault(str(one.threads), {})[one.system] = {
            "end_to_end_p50_s": round(one.end_to_end.p50, 6),
            "end_to_end_p99_s": round(one.end_to_end.p99, 6),
            "cpu_p50_s": round(one.cpu_p50_s, 6),
            "speedup": round(one.speedup, 3),
            "second_expression_speedup": None if second is None else round(second, 3),
            "mean_mask_iou": round(one.mean_mask_iou, 5),
            "agreement": round(one.agreement, 5),
            "peak_memory_mb": round(one.peak_memory_mb, 1),
        }
    told = row.to_json()
    second = row.second_speedup
    return {
        "benchmark": "latency",
        "precision": precision,
        "threads": threads,
        "stages": told["stages"],
        "end_to_end_p50_s": round(row.end_to_end.p50, 6),
        "end_to_end_p90_s": round(row.end_to_end.p90, 6),
        "end_to_end_p99_s": round(row.end_to_end.p99, 6),
        "plain_torch_p50_s": round(plain.end_to_end.p50, 6),
        "speedup": told["speedup"],
        "speedup_counts": row.counts,
        "second_expression_p50_s": None if row.second is None else round(row.second.p50, 6),
        "second_expression_speedup": None if second is None else round(second, 3),
        "mean_mask_iou": told["mean_mask_iou"],
        "plain_torch_mean_mask_iou": round(plain.mean_mask_iou, 5),
        "agreement": told["agreement"],
        "peak_memory_mb": told["peak_memory_mb"],
        "plain_torch_peak_memory_mb": round(plain.peak_memory_mb, 1),
        "tokens": told["tokens"],
        "forward_calls": told["forward_calls"],
        "cold_start": cold,
        "by_threads": per_thread,
    }


def _cell(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return " / ".join(f"{1e3 * value:.2f}" for value in (spread.p50, spread.p90, spread.p99))


def _agree(run: Run, other: Run) -> float:
    return masks.iou(masks.decode_rle(run.mask), masks.decode_rle(other.mask))
