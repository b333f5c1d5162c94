"""One row of the latency benchmark in a process of its own, driven line by line.

``worker.py TASK`` loads what TASK (a JSON file's path) describes, then answers each line of stdin (a JSON
list: one of REQUESTS, the index of an example, the order of its expressions) with one JSON line on stdout. So
a row shares no memory, no warm cache and no thread pool with another, while the driver can still take turns
between rows. torch is loaded by the rows of torch alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import numpy.typing as npt

from benchmarks.fixed_answers import fix_answers
from ppcr import masks
from runtime.pipeline import Pipeline
from runtime.result import Costs, Result

if TYPE_CHECKING:
    from ppcr.model.reference import ReferenceResult

PLAIN = "torch"
"""The row of the plain torch pipeline, and its kind."""
ENGINE, REUSED, FORCED = "engine", "torch, cache kept", "torch, cache kept, forced"
"""Kinds of the other rows: a bundle on an engine; eager torch with one cache for both turns and every
expression; the same with forced tokens fed in blocks."""
ANSWER, TRACE, SETTLE = "answer", "trace", "settle"
REQUESTS = (ANSWER, TRACE, SETTLE)
"""Expressions of an image, timed; one expression, with the place of every call (`benchmarks.tracing`); wait
until nothing is left to do."""
_PATIENCE, _IDLE = 30.0, 0.2


@dataclass(frozen=True)
class Task:
    """What a worker is to load.

    Attributes:
        system: the row's name.
        source: the checkpoint's folder for PLAIN, else the bundle's.
        examples: an .npz file with images uint8 [N, S, S, 3], truths bool [N, E, S, S] and expressions
            str [N, E].
        threads: processors to use.
        kind: PLAIN, ENGINE, REUSED or FORCED. engine, precision: of ENGINE.
        checkpoint: of REUSED and FORCED, whose bundle gives the rest, and of engines that read its weights.
        device: of torch, "cpu" or "cuda".
        overlap: whether the segmenter's encoder may run beside the MLLM.
        together: all expressions of an image go in one call, whose time is shared out equally.
        fixed: answers have fixed lengths (`benchmarks.fixed_answers`), for weights that say nothing.
        drafts: of ENGINE: whether stage 1's answers may be guessed (`ppcr.drafts`).
    """

    system: str
    source: str
    examples: str
    threads: int
    kind: str = ENGINE
    engine: str = "onnxruntime"
    precision: str = "auto"
    checkpoint: str = ""
    device: str = "cpu"
    overlap: bool = True
    together: bool = False
    fixed: bool = False
    drafts: bool = True


@dataclass(frozen=True)
class Run:
    """One expression, timed.

    Attributes:
        seconds: from the expression (and, for the first one of an image, the image) to masks.
        cpu: seconds of processor time, all threads together; what else the machine does hardly moves it.
        stages: seconds that the caller waited for each stage. device: seconds each stage was at work.
        tokens, forward_calls: of the MLLM. drafted, accepted: tokens guessed, and rightly so.
        iou: of the whole mask with the truth.
        mask: the whole mask as COCO run lengths, to compare rows.
    """

    seconds: float
    cpu: float
    stages: dict[str, float]
    device: dict[str, float]
    tokens: int
    forward_calls: int
    drafted: int
    accepted: int
    iou: float
    mask: masks.RLE


Measures = tuple[dict[str, float], dict[str, float], Costs]
"""Seconds waited for and at work by stage, and what the MLLM did."""


class View(Protocol):
    """One image, looked at."""

    def segment(self, expression: str) -> Any: ...

    def segment_many(self, expressions: Sequence[str]) -> Sequence[Any]: ...


@dataclass(frozen=True)
class System:
    """What a task has loaded.

    Attributes:
        open: looks at an image uint8 [H, W, 3]. read: what a result cost.
        engine: what really runs ("engine", "precision", …). pipeline: None for the plain torch pipeline.
    """

    open: Callable[[npt.NDArray[np.uint8]], View]
    read: Callable[[Any], Measures]
    engine: Mapping[str, Any]
    pipeline: Pipeline | None = None


def load(task: Task) -> System:
    """Load what ``task`` describes. Raises what loading it raises."""
    if task.kind == PLAIN:
        return plain(task)
    if task.kind == ENGINE:
        pipeline = Pipeline.load(
            task.source,
            precision=task.precision,
            threads=task.threads,
            engine=task.engine,
            checkpoint=task.checkpoint or None,
            drafts=task.drafts,
        )
    else:
        from benchmarks.torch_steps import eager_pipeline

        pipeline = eager_pipeline(
            Path(task.source),
            Path(task.checkpoint),
            threads=task.threads,
            device=task.device,
            forced=task.kind == FORCED,
        )
    if task.fixed:
        fix_answers(pipeline.bundle.tokenizer)
    if not task.overlap:
        pipeline.background = None
    return System(pipeline.open, _costs, pipeline.engine, pipeline)


def _costs(result: Result) -> Measures:
    timings = {name: timing for name, timing in result.timings.items() if name != "total"}
    walls = {name: timing.wall for name, timing in timings.items()}
    devices = {name: timing.device for name, timing in timings.items()}
    return walls, devices, result.costs


def plain(task: Task) -> System:
    """The torch reference: nothing is kept between turns, expressions or images."""
    from benchmarks.torch_steps import EAGER, PlainView, plain_pipeline, precision_of

    pipeline = plain_pipeline(Path(task.source), threads=task.threads, device=task.device)
    if task.fixed:
        fix_answers(pipeline.tokenizer)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    pipeline.mllm.register_forward_hook(count)

    def read(result: ReferenceResult) -> Measures:
        nonlocal calls
        called, calls = calls, 0
        tokens = len(result.semantic_ids) + len(result.spatial_ids)
        return result.seconds, result.seconds, Costs(tokens, called)

    told = {"engine": EAGER, "precision": precision_of(pipeline)}
    return System(lambda image: PlainView(pipeline, image), read, told)


@dataclass(frozen=True)
class Examples:
    """The arrays of `Task.examples`."""

    images: npt.NDArray[np.uint8]
    truths: npt.NDArray[np.bool_]
    expressions: npt.NDArray[np.str_]

    @classmethod
    def load(cls, path: str) -> Examples:
        held = np.load(path)
        return cls(held["images"], held["truths"], held["expressions"])

    def texts(self, image: int, order: Sequence[int]) -> list[str]:
        return [str(self.expressions[image, place]) for place in order]


def answer(system: System, held: Examples, image: int, order: Sequence[int]) -> list[Run]:
    """One expression after the other; the first answers for opening the image as well."""
    runs = []
    start, worked = time.perf_counter(), time.process_time()
    view = system.open(held.images[image])
    for place, expression in zip(order, held.texts(image, order), strict=True):
        result = view.segment(expression)
        seconds, cpu = time.perf_counter() - start, time.process_time() - worked
        runs.append(_run(system, result, seconds, cpu, held.truths[image, place]))
        start, worked = time.perf_counter(), time.process_time()
    return runs


def together(system: System, held: Examples, image: int, order: Sequence[int]) -> list[Run]:
    """All expressions in one call."""
    start, worked = time.perf_counter(), time.process_time()
    results = system.open(held.images[image]).segment_many(held.texts(image, order))
    seconds, cpu = time.perf_counter() - start, time.process_time() - worked
    n = len(order)
    return [
        _run(system, result, seconds / n, cpu / n, held.truths[image, place])
        for place, result in zip(order, results, strict=True)
    ]


def _run(system: System, result: Any, seconds: float, cpu: float, truth: npt.NDArray[np.bool_]) -> Run:
    walls, devices, costs = system.read(result)
    iou, mask = masks.iou(result.mask, truth), masks.encode_rle(result.mask)
    return Run(
        seconds, cpu, walls, devices, costs.tokens, costs.forward_calls, costs.drafted_tokens,
        costs.accepted_tokens, iou, mask,
    )  # fmt: skip


def main(path: str) -> int:
    """Serve the task described in the file ``path`` until stdin ends."""
    from benchmarks.machine import peak_gpu_memory_mb, peak_memory_mb

    # Whatever a library prints must not get among the answers.
    with _answers() as out:
        task = Task(**json.loads(Path(path).read_text(encoding="utf-8")))
        held = Examples.load(task.examples)
        start = time.perf_counter()
        system = load(task)
        loaded = time.perf_counter() - start
        torch_loaded = "torch" in sys.modules
        _say(out, {"loaded_s": loaded, "torch_loaded": torch_loaded, "engine": system.engine})
        for line in sys.stdin:
            request, image, order = json.loads(line)
            if request == SETTLE:
                _settle()
                _say(out, {})
                continue
            if request == TRACE:
                from benchmarks.tracing import trace

                assert system.pipeline is not None
                (text,) = held.texts(image, order)
                _say(out, trace(system.pipeline, held.images[image], text).to_json())
                continue
            runs = (together if task.together else answer)(system, held, image, order)
            # Where torch computes on a GPU, its memory is the scarce one.
            peak = peak_gpu_memory_mb() or peak_memory_mb()
            _say(out, {"runs": [asdict(run) for run in runs], "peak_memory_mb": peak})
    return 0


def _settle() -> None:
    """Wait until nothing is at work in this process, such as an engine that compiles in the background."""
    until = time.perf_counter() + _PATIENCE
    while time.perf_counter() < until:
        worked = time.process_time()
        time.sleep(_IDLE)
        if time.process_time() - worked < _IDLE / 4:
            return


@contextmanager
def _answers() -> Iterator[TextIO]:
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        yield out


def _say(out: TextIO, value: dict[str, Any]) -> None:
    print(json.dumps(value), file=out, flush=True)


if __name__ == "__main__":
    from ppcr.errors import run_cli

    sys.exit(run_cli(lambda: main(sys.argv[1])))
