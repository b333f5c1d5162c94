"""Starts the rows of the latency benchmark, each in a fresh process, and takes turns between them."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.tracing import Trace
from benchmarks.worker import ANSWER, PLAIN, SETTLE, TRACE, Run, Task
from ppcr.errors import ERRORS, EngineError, PPCRError

_HERE = Path(__file__).resolve().parent
_PAUSE = 0.02  # for threads that still spin, or encode an image in the background, after an answer
_WARM_UP = 4


@dataclass
class Row:
    """Everything one worker measured. Keys of runs: (image, place of the expression).

    peak_memory_mb: of the process; of the GPU where torch computes on one.
    engine: what really ran, as `runtime.pipeline.Pipeline.engine` says it.
    """

    task: Task
    loaded_s: float
    torch_loaded: bool
    peak_memory_mb: float = 0.0
    first: list[tuple[tuple[int, int], Run]] = field(default_factory=list)
    second: list[tuple[tuple[int, int], Run]] = field(default_factory=list)
    engine: dict[str, Any] = field(default_factory=dict)


class Worker:
    """A process that serves one task. Use as a context manager: leaving it ends the process."""

    def __init__(self, task: Task, folder: Path) -> None:
        name = re.sub(r"[^a-z0-9]+", "-", f"{task.system}-{task.threads}")
        self.task, self._log = task, folder / f"{name}.log"
        path = folder / f"{name}.json"
        path.write_text(json.dumps(asdict(task)), encoding="utf-8")
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(_HERE / "worker.py"), str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(task.threads),
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def loaded(self) -> Row:
        """Wait until the system is loaded. Raises what the worker raised."""
        told = self._read()
        return Row(self.task, told["loaded_s"], told["torch_loaded"], engine=told["engine"])

    def ask(self, image: int, order: Sequence[int]) -> tuple[list[Run], float]:
        """Open an image and segment its expressions in ``order``; the runs, and peak memory in MiB so far."""
        told = self._ask([ANSWER, image, list(order)])
        return [Run(**run) for run in told["runs"]], told["peak_memory_mb"]

    def settle(self) -> None:
        """Wait until the process has nothing left to do, as what engines prepare in the background."""
        self._ask([SETTLE, 0, []])

    def trace(self, image: int, place: int = 0) -> Trace:
        """One expression of an image with the place of every engine call (`benchmarks.tracing`)."""
        return Trace.from_json(self._ask([TRACE, image, [place]]))

    def _ask(self, request: list[Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise failure(self._process.wait(), self._log.read_text(), self.task.system) from None
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise failure(self._process.wait(), self._log.read_text(), self.task.system)
        told: dict[str, Any] = json.loads(line)
        return told


@dataclass
class Measured:
    """Rows that were measured together, and by system name why others could not be.

    traces: of the rows that were asked for them, by system name.
    """

    rows: list[Row]
    left_out: dict[str, str]
    traces: dict[str, list[Trace]] = field(default_factory=dict)


def measure_rows(
    tasks: Sequence[Task],
    images: int,
    repeats: int,
    folder: Path,
    *,
    expressions: int = 2,
    optional: bool = False,
    traced: int = 0,
    apart: bool = False,
    plain_once: bool = True,
) -> Measured:
    """All tasks side by side: every image goes to each of them before the next one, after a warm-up.

    Every round opens each image anew and asks its expressions, in an order that alternates between rounds:
    first and further answers are then of the same expressions. The order of tasks rotates from image to
    image. The plain row keeps nothing of an image: with ``plain_once`` it is asked the first expression only.

    optional: an engine that cannot be loaded is left out, unless none can. traced: images of which each
    engine's row gives a trace as well, after its times have been taken. apart: one task after the other, for
    models that do not fit into memory side by side.
    """
    whole = Measured([], {})
    refused: list[PPCRError] = []
    for group in [[task] for task in tasks] if apart else [list(tasks)]:
        with ExitStack() as stack:
            pairs = []
            for worker in [stack.enter_context(Worker(task, folder)) for task in group]:
                try:
                    pairs.append((worker, worker.loaded()))
                except PPCRError as error:
                    if not optional:
                        raise
                    refused.append(error)
                    name = worker.task.system
                    whole.left_out[name] = str(error).removeprefix(f"{name}: ")
            _take_turns(pairs, images, repeats, tuple(range(expressions)), plain_once)
            whole.rows += [row for _, row in pairs]
            for worker, row in pairs:
                if traced and row.task.kind != PLAIN:
                    time.sleep(_PAUSE)
                    found = [worker.trace(image) for image in range(min(images, traced))]
                    whole.traces[row.task.system] = found
    if refused and all(row.task.kind == PLAIN for row in whole.rows):
        raise refused[0]
    return whole


def _take_turns(
    pairs: list[tuple[Worker, Row]], images: int, repeats: int, places: tuple[int, ...], plain_once: bool
) -> None:
    """Measure loaded rows, which gather their runs."""
    for worker, _ in pairs:
        for image in range(min(images, _WARM_UP)):
            worker.ask(image, places)
        worker.settle()
    for turn in range(images * repeats if pairs else 0):
        image, order = turn % images, places if turn // images % 2 == 0 else places[::-1]
        shift = turn % len(pairs)
        for worker, row in pairs[shift:] + pairs[:shift]:
            time.sleep(_PAUSE)
            asked = order[:1] if plain_once and worker.task.kind == PLAIN else order
            runs, row.peak_memory_mb = worker.ask(image, asked)
            found = [((image, place), run) for place, run in zip(asked, runs, strict=True)]
            row.first.append(found[0])
            row.second += found[1:]


def cold_start(
    bundle: Path,
    checkpoint: Path,
    engine: str,
    precision: str,
    threads: int,
    image: Path,
    expression: str,
    *,
    repeats: int = 3,
) -> dict[str, Any]:
    """Medians over fresh processes: from their start to the first mask, and its steps, in seconds.

    ``torch_loaded`` says whether any of them had torch in memory at the end.
    """
    command = [str(bundle), str(checkpoint), engine, precision, str(threads), str(image), expression]
    told: list[dict[str, Any]] = []
    for _ in range(repeats):
        start = time.perf_counter()
        run = subprocess.run(
            [sys.executable, str(_HERE / "cold.py"), *command],
            capture_output=True,
            text=True,
            env=environment(threads),
        )
        seconds = time.perf_counter() - start
        if run.returncode:
            raise failure(run.returncode, run.stderr, "cold start")
        told.append({**last_line(run.stdout), "total_s": seconds})
    names = ("total_s", "import_s", "load_s", "first_mask_s")
    medians = {name: round(statistics.median(one[name] for one in told), 4) for name in names}
    return {**medians, "torch_loaded": any(one["torch_loaded"] for one in told), "processes": repeats}


def environment(threads: int) -> dict[str, str]:
    """The environment of a measured process."""
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)}


def last_line(text: str) -> dict[str, Any]:
    """The JSON object in the last line of a process's output."""
    told: dict[str, Any] = json.loads(text.splitlines()[-1])
    return told


def failure(code: int, log: str, what: str) -> PPCRError:
    """What a process that ended with ``code`` meant: its own kind of error, with its last line."""
    kinds = {error.exit_code: error for error in ERRORS}
    last = log.strip().rpartition("\n")[2].removeprefix("error: ") or f"ended with exit code {code}"
    return kinds.get(code, EngineError)(f"{what}: {last}")
