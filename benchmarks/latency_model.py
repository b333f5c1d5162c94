"""What the latency benchmark knows of one model: the rows it gives, and the work it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks import card
from benchmarks.examples import Example
from benchmarks.rates import CPU, CUDA
from benchmarks.rows import RowPlan
from benchmarks.worker import PLAIN, Task
from ppcr.checkpoint import Checkpoint
from ppcr.errors import PPCRError
from ppcr.manifest import DRAFTS, Manifest
from runtime import selection
from runtime.engine_checks import graph_precision


@dataclass(frozen=True)
class Model:
    """A bundle, what it was made from, and the rows it gives.

    Attributes:
        left_out: rows that cannot be tried, by name, with the reason. note: for the card; "" for none.
        random: its weights say nothing: masks are not judged, and answers have fixed lengths.
    """

    bundle: Path
    checkpoint: Checkpoint
    manifest: Manifest
    rows: tuple[RowPlan, ...]
    left_out: Mapping[str, str]
    note: str = ""
    same_source: bool = True
    random: bool = False

    @property
    def device(self) -> str:
        """Where plain torch runs, and whose floors count: that of the first row."""
        return CUDA if self.rows[0].on_gpu else CPU

    @property
    def plain_precision(self) -> str:
        """Of plain torch there."""
        return "bf16" if self.device == CUDA else "fp32"

    @property
    def stored(self) -> list[str]:
        """Precisions of the bundle whose graphs the rows read."""
        return list(dict.fromkeys(self.stored_as(row) for row in self.rows))

    def stored_as(self, row: RowPlan) -> str:
        """The bundle's precision that a row reads."""
        return graph_precision(row.engine, self.manifest, row.precision)

    @cached_property
    def default_row(self) -> RowPlan:
        """The row that the summary is about: the one that "auto" takes.

        Where that was not asked for, the first engine's at the bundle's own precision.
        """
        with suppress(PPCRError):
            taken = selection.choose(self.bundle, checkpoint=self.checkpoint.root)
            for row in self.rows:
                if (row.engine, row.precision) == (taken.name, taken.precision):
                    return row
        wanted = self.manifest.default_precision
        return next((row for row in self._first_engine if row.precision == wanted), self.rows[0])

    @property
    def ladder(self) -> list[RowPlan]:
        """Rows as the waterfall climbs them: plain torch's precision first where there is a row of it."""
        wanted = self.plain_precision
        first = next((row for row in self._first_engine if row.precision == wanted), self.default_row)
        return [first, *(row for row in self.rows if row != first)]

    @property
    def _first_engine(self) -> list[RowPlan]:
        return [row for row in self.rows if row.engine == self.rows[0].engine]

    def tasks(self, examples: Path, threads: int, *, torch: bool) -> list[Task]:
        """A task for each row, and the plain torch pipeline's where that is wanted."""
        common: dict[str, Any] = {
            "examples": str(examples), "threads": threads, "fixed": self.random, "device": self.device,
            "checkpoint": str(self.checkpoint.root),
        }  # fmt: skip
        tasks = [
            Task(row.name, str(self.bundle), engine=row.engine, precision=row.precision, **common)
            for row in self.rows
        ]
        if DRAFTS in self.manifest.files:
            # Guesses are as good as the glossary knows the wordings: what one gets without them is told too.
            place = self.rows.index(self.default_row)
            twin = replace(tasks[place], system=undrafted(self.default_row), drafts=False)
            tasks.insert(place + 1, twin)
        plain = Task(PLAIN, str(self.checkpoint.root), kind=PLAIN, **common)
        return [*tasks, plain] if torch else tasks


def undrafted(row: RowPlan) -> str:
    """The name of a row's twin that writes stage 1's answer word by word."""
    return f"{row.name}, no drafts"


def work_of(model: Model, scenes: Sequence[Example]) -> dict[str, dict[str, float]]:
    """FLOPs of each stage (`benchmarks.card.flops`) for these scenes."""
    texts = [
        (one.text, one.semantic.text, len(one.targets)) for scene in scenes for one in scene.expressions[:2]
    ]
    return card.sizes_alone(model.checkpoint, texts) if model.random else card.loaded(model.checkpoint, texts)
