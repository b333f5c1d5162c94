"""Everything the latency benchmark measures of one model: rows, cold start, and what else was asked for."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import card, floor, report, throughput, timeline, waterfall
from benchmarks.examples import Example
from benchmarks.latency_model import Model
from benchmarks.rates import CPU, CUDA, Rates
from benchmarks.rows import DEFAULT, RowPlan
from benchmarks.workers import Measured, cold_start, measure_rows

_TRACED = 8
"""Images of which each row gives a trace, after its times have been taken."""


@dataclass(frozen=True)
class Wanted:
    """What was asked for on the command line, as `benchmarks.latency` has it."""

    repeats: int
    threads: tuple[int, ...]
    torch: bool = True
    floor: bool = False
    waterfall: bool = False
    batch: int | None = None
    timeline: Path | None = None

    @property
    def expressions(self) -> int:
        """Expressions that each image needs."""
        return max(2, waterfall.EXPRESSIONS if self.waterfall else 0, self.batch or 0)


def measure(
    model: Model, scenes: Sequence[Example], work: dict[str, dict[str, float]], wanted: Wanted
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure and print everything; the record for the results file, and every single run."""
    with tempfile.TemporaryDirectory(prefix="ppcr-latency-") as name:
        return _Measurement(model, scenes, work, wanted, Path(name)).run()


class _Measurement:
    """One model in one temporary folder; gathers figures and single runs."""

    def __init__(
        self,
        model: Model,
        scenes: Sequence[Example],
        work: dict[str, dict[str, float]],
        wanted: Wanted,
        folder: Path,
    ) -> None:
        self.model, self.work, self.wanted, self.folder = model, work, wanted, folder
        self.held, self.picture, self.expression = _write(scenes, folder)
        self.images = len(scenes)
        self.weights = {name: card.weights(model.manifest, name) for name in model.stored}
        self.rows: list[report.RowFigures] = []
        self.runs: list[dict[str, Any]] = []
        self.left_out = dict(model.left_out)
        self.floors: dict[str, dict[str, Any]] = {}

    def run(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        model, wanted = self.model, self.wanted
        for threads in wanted.threads:
            self._rows(threads)
        threads, most = wanted.threads[0], max(wanted.threads)
        default = self._present(threads)
        cold = None
        if not model.random:
            # A model of random weights would not hold to the lengths of its answers there.
            cold = cold_start(
                model.bundle,
                model.checkpoint.root.resolve(),
                default.engine,
                default.precision,
                threads,
                self.picture,
                self.expression,
            )
            print("", report.cold_line(cold, default.name, threads), sep="\n")
        summary = report.summary(self.rows, cold, default.name, threads)
        if wanted.floor:
            summary["floor"] = self.floors
        if wanted.waterfall:
            summary["waterfall"] = self._waterfall(most)
        if wanted.batch is not None:
            summary["batch"] = self._batch(wanted.batch, default, most)
        summary |= {
            "model": model.manifest.name,
            "random_weights": model.random,
            "note": model.note,
            "left_out": self.left_out,
            "same_source": model.same_source,
        }
        record = {
            "weights_bytes": self.weights,
            "flops": {stage: {k: round(v) for k, v in counts.items()} for stage, counts in self.work.items()},
            "rows": [row.to_json() for row in self.rows],
            "summary": summary,
        }
        return record, self.runs

    def _rows(self, threads: int) -> None:
        model, wanted = self.model, self.wanted
        measured = measure_rows(
            model.tasks(self.held, threads, torch=wanted.torch),
            self.images,
            wanted.repeats,
            self.folder,
            optional=model.random or any(row.engine != DEFAULT for row in model.rows),
            traced=_TRACED if wanted.floor or wanted.timeline is not None else 0,
            apart=model.random,
        )
        self.left_out |= measured.left_out
        found = report.figures(measured.rows, judged=not model.random)
        self.rows += found
        self.runs += report.raw(measured.rows)
        print("", *report.table(found), sep="\n")
        for name, reason in self.left_out.items():
            print(f"left out  {name}: {reason}")
        if wanted.floor:
            self.floors[str(threads)] = self._floors(threads, found, measured)
        default = self._present(threads)
        if wanted.timeline is not None and threads == max(wanted.threads):
            self._timeline(wanted.timeline, default, threads, measured)
        sys.stdout.flush()

    def _present(self, threads: int) -> RowPlan:
        """The default row, or the first one that could be loaded."""
        measured = {row.system for row in self.rows if row.threads == threads}
        default = self.model.default_row
        return next(row for row in (default, *self.model.rows) if row.name in measured)

    def _floors(self, threads: int, found: Sequence[report.RowFigures], measured: Measured) -> dict[str, Any]:
        plans = {row.name: row for row in self.model.rows}
        by_name = {one.system: one for one in found if one.system in plans}
        held = {name: self._held(plans[name]) for name in by_name}
        devices = {name: CUDA if plans[name].on_gpu else CPU for name in by_name}
        rates: dict[str, Rates] = {}
        for device in dict.fromkeys(devices.values()):
            there = [listed for name, listed in held.items() if devices[name] == device]
            sizes = sorted({round(size) for listed in there for size in listed.values()})
            rates[device] = floor.measure_rates(device, threads, sizes)
            print("", *floor.rates_lines(rates[device]), sep="\n")
        told: dict[str, Any] = {"rates": {device: one.to_json() for device, one in rates.items()}}
        for name, one in by_name.items():
            stages = floor.floors(
                self.work,
                held[name],
                measured.traces[name],
                one.device,
                rates[devices[name]],
                plans[name].precision,
            )
            print("", *floor.table(name, stages, one.end_to_end.p50), sep="\n")
            told[name] = floor.to_json(stages, one.end_to_end.p50)
        return told

    def _held(self, row: RowPlan) -> dict[str, float]:
        """Bytes of weights by stage, as the engine of ``row`` holds them."""
        stored, manifest = self.model.stored_as(row), self.model.manifest
        if stored != row.precision and "fp32" in manifest.precisions:
            stored = "fp32"  # the engine casts: its weights are best counted from those that are whole
        sizes = floor.by_stage(card.weights(manifest, stored))
        return {stage: floor.scaled(size, stored, row.precision) for stage, size in sizes.items()}

    def _timeline(self, path: Path, row: RowPlan, threads: int, measured: Measured) -> None:
        traces = sorted(measured.traces[row.name], key=lambda trace: trace.seconds)
        # The median of those that found something, where there are such: all stages are in it.
        found = [trace for trace in traces if "masks" in trace.wall] or traces
        trace = found[len(found) // 2]
        what = f"{self.model.manifest.name}, {row.engine} {row.precision}, threads: {threads}"
        timeline.draw(trace, path, f"{what}; one image, one expression: {1e3 * trace.seconds:.1f} ms")
        share = 100 * timeline.hidden(trace)
        print(f"timeline  {path}: {share:.0f} % of the image encoder's work lies beside the MLLM's")

    def _waterfall(self, threads: int) -> list[dict[str, Any]]:
        model, wanted = self.model, self.wanted
        checkpoint = model.checkpoint.root
        listed = waterfall.steps(
            model.bundle, checkpoint, model.ladder, self.held, threads, fixed=model.random
        )
        found, rows, left_out = waterfall.measure(
            listed, self.images, wanted.repeats, self.folder, judged=not model.random, apart=model.random
        )
        self.runs += report.raw(rows, waterfall.names(listed))
        print("", *waterfall.table(listed, found, left_out), sep="\n", flush=True)
        return waterfall.to_json(listed, found, left_out)

    def _batch(self, expressions: int, row: RowPlan, threads: int) -> dict[str, Any]:
        task = next(
            task for task in self.model.tasks(self.held, threads, torch=False) if task.system == row.name
        )
        images = min(self.images, throughput.MAX_IMAGES)
        found = throughput.measure(
            task, expressions, images, self.wanted.repeats, self.folder, judged=not self.model.random
        )
        print("", *throughput.table(row.name, threads, found), sep="\n", flush=True)
        return throughput.to_json(row.name, threads, found)


def _write(scenes: Sequence[Example], folder: Path) -> tuple[Path, Path, str]:
    """The examples for the workers; a picture and an expression with a target for the cold start."""
    held, picture = folder / "examples.npz", folder / "scene.png"
    np.savez(
        held,
        images=np.stack([scene.image for scene in scenes]),
        truths=np.stack([scene.truths for scene in scenes]),
        expressions=np.array([[one.text for one in scene.expressions] for scene in scenes]),
    )
    choices = [(scene, one) for scene in scenes for one in scene.expressions]
    scene, expression = next((pair for pair in choices if pair[1].targets), choices[0])
    Image.fromarray(scene.image).save(picture)
    return held, picture, expression.text
