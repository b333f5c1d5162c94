"""One row of the latency benchmark in a process of its own, driven line by line.

``worker.py TASK`` loads what TASK (a JSON file's path) describes, then answers each line of stdin (the index
of an example and the order of its expressions) with one JSON line on stdout. So a row shares no memory, no
warm cache and no thread pool with another, while the driver can still take turns between rows. torch is
loaded by the plain torch row alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import numpy.typing as npt

from ppcr import masks

PLAIN = "torch"
"""The row of the plain torch pipeline; the other rows are called as their precisions."""


@dataclass(frozen=True)
class Task:
    """What a worker is to load.

    Attributes:
        system: PLAIN, or a precision of the bundle.
        source: the checkpoint's folder for PLAIN, else the bundle's.
        examples: an .npz file with images uint8 [N, S, S, 3], truths bool [N, E, S, S] and expressions
            str [N, E].
        threads: processors to use.
    """

    system: str
    source: str
    examples: str
    threads: int


@dataclass(frozen=True)
class Run:
    """One expression, timed.

    Attributes:
        seconds: from the expression (and, for the first one of an image, the image) to masks.
        cpu: seconds of processor time, all threads together; what else the machine does hardly moves it.
        stages: seconds that the caller waited for each stage. device: seconds each stage was at work.
        tokens, forward_calls: of the MLLM.
        iou: of the whole mask with the truth.
        mask: the whole mask as COCO run lengths, to compare rows.
    """

    seconds: float
    cpu: float
    stages: dict[str, float]
    device: dict[str, float]
    tokens: int
    forward_calls: int
    iou: float
    mask: masks.RLE


Segment = Callable[[str], Any]
Opener = Callable[[npt.NDArray[np.uint8]], Segment]
Reader = Callable[[Any], tuple[dict[str, float], dict[str, float], int, int]]


def engine(task: Task) -> tuple[Opener, Reader]:
    """Opener of images, and reader of results, of a bundle."""
    from runtime.pipeline import Pipeline
    from runtime.result import Result

    pipeline = Pipeline.load(task.source, precision=task.system, threads=task.threads)

    def read(result: Result) -> tuple[dict[str, float], dict[str, float], int, int]:
        timings = {name: timing for name, timing in result.timings.items() if name != "total"}
        walls = {name: timing.wall for name, timing in timings.items()}
        devices = {name: timing.device for name, timing in timings.items()}
        return walls, devices, result.costs.tokens, result.costs.forward_calls

    return lambda image: pipeline.open(image).segment, read


def plain(task: Task) -> tuple[Opener, Reader]:
    """Opener of images, and reader of results, of the torch reference."""
    import torch

    from ppcr.model.reference import ReferencePipeline, ReferenceResult

    torch.set_num_threads(task.threads)
    pipeline = ReferencePipeline.load(Path(task.source))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    pipeline.mllm.register_forward_hook(count)

    def read(result: ReferenceResult) -> tuple[dict[str, float], dict[str, float], int, int]:
        nonlocal calls
        called, calls = calls, 0
        tokens = len(result.semantic_ids) + len(result.spatial_ids)
        return result.seconds, result.seconds, tokens, called

    def opened(image: npt.NDArray[np.uint8]) -> Segment:
        return lambda expression: pipeline.segment(image, expression)

    return opened, read


def main(path: str) -> int:
    """Serve the task described in the file ``path`` until stdin ends."""
    from benchmarks.machine import peak_memory_mb

    # Whatever a library prints must not get among the answers.
    with _answers() as out:
        task = Task(**json.loads(Path(path).read_text(encoding="utf-8")))
        held = np.load(task.examples)
        images, truths, expressions = held["images"], held["truths"], held["expressions"]
        start = time.perf_counter()
        opener, read = plain(task) if task.system == PLAIN else engine(task)
        loaded = time.perf_counter() - start
        _say(out, {"loaded_s": loaded, "torch_loaded": "torch" in sys.modules})
        for line in sys.stdin:
            index, order = json.loads(line)
            runs = []
            start, worked = time.perf_counter(), time.process_time()
            segment = opener(images[index])
            for place in order:
                result = segment(str(expressions[index, place]))
                seconds, cpu = time.perf_counter() - start, time.process_time() - worked
                walls, devices, tokens, calls = read(result)
                iou, mask = masks.iou(result.mask, truths[index, place]), masks.encode_rle(result.mask)
                runs.append(Run(seconds, cpu, walls, devices, tokens, calls, iou, mask))
                start, worked = time.perf_counter(), time.process_time()
            _say(out, {"runs": [asdict(run) for run in runs], "peak_memory_mb": peak_memory_mb()})
    return 0


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
