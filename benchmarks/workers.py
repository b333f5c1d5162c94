"""Starts the rows of the latency benchmark, each in a fresh process, and takes turns between them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.worker import PLAIN, Run, Task
from ppcr.errors import ERRORS, EngineError, PPCRError

_HERE = Path(__file__).resolve().parent
_PAUSE = 0.02  # for threads that still spin, or encode an image in the background, after an answer
_WARM_UP = 2


@dataclass
class Row:
    """Everything one worker measured. Keys of runs: (image, place of the expression)."""

    task: Task
    loaded_s: float
    torch_loaded: bool
    peak_memory_mb: float = 0.0
    first: list[tuple[tuple[int, int], Run]] = field(default_factory=list)
    second: list[tuple[tuple[int, int], Run]] = field(default_factory=list)


class Worker:
    """A process that serves one task. Use as a context manager: leaving it ends the process."""

    def __init__(self, task: Task, folder: Path) -> None:
        name = f"{task.system}-{task.threads}"
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
        return Row(self.task, told["loaded_s"], told["torch_loaded"])

    def ask(self, image: int, order: Sequence[int]) -> tuple[list[Run], float]:
        """Open an image and segment its expressions in ``order``; the runs, and peak memory in MiB so far."""
        assert self._process.stdin is not None
        try:
            print(json.dumps([image, list(order)]), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise failure(self._process.wait(), self._log.read_text(), self.task.system) from None
        told = self._read()
        return [Run(**run) for run in told["runs"]], told["peak_memory_mb"]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise failure(self._process.wait(), self._log.read_text(), self.task.system)
        told: dict[str, Any] = json.loads(line)
        return told


def measure_rows(tasks: Sequence[Task], images: int, repeats: int, folder: Path) -> Iterator[Row]:
    """All tasks side by side: every image goes to each of them before the next one, after a warm-up.

    Every round opens each image anew and asks both of its expressions, in an order that alternates between
    rounds: first and second answers are then of the same expressions. The plain row keeps nothing of an
    image, so that it is asked the first one only. The order of tasks rotates from image to image.
    """
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(task, folder)) for task in tasks]
        rows = [worker.loaded() for worker in workers]
        for worker in workers:
            for image in range(min(images, _WARM_UP)):
                worker.ask(image, (0, 1))
        pairs = list(zip(workers, rows, strict=True))
        for turn in range(images * repeats):
            image, order = turn % images, (0, 1) if turn // images % 2 == 0 else (1, 0)
            shift = turn % len(pairs)
            for worker, row in pairs[shift:] + pairs[:shift]:
                time.sleep(_PAUSE)
                asked = order[:1] if worker.task.system == PLAIN else order
                runs, row.peak_memory_mb = worker.ask(image, asked)
                for place, run, listed in zip(asked, runs, (row.first, row.second), strict=False):
                    listed.append(((image, place), run))
        yield from rows


def cold_start(
    bundle: Path, precision: str, threads: int, image: Path, expression: str, *, repeats: int = 3
) -> dict[str, Any]:
    """Medians over fresh processes: from their start to the first mask, and its steps, in seconds.

    ``torch_loaded`` says whether any of them had torch in memory at the end.
    """
    command = [str(bundle), precision, str(threads), str(image), expression]
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
        told.append({**json.loads(run.stdout), "total_s": seconds})
    names = ("total_s", "import_s", "load_s", "first_mask_s")
    medians = {name: round(statistics.median(one[name] for one in told), 4) for name in names}
    return {**medians, "torch_loaded": any(one["torch_loaded"] for one in told), "processes": repeats}


def environment(threads: int) -> dict[str, str]:
    """The environment of a measured process."""
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)}


def failure(code: int, log: str, what: str) -> PPCRError:
    """What a process that ended with ``code`` meant: its own kind of error, with its last line."""
    kinds = {error.exit_code: error for error in ERRORS}
    last = log.strip().rpartition("\n")[2].removeprefix("error: ") or f"ended with exit code {code}"
    return kinds.get(code, EngineError)(f"{what}: {last}")
