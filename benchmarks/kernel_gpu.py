"""The kernels on a GPU: correctness, times against every rival, memory, and launches counted by profiling.

Written against the sources of torch 2.11 to 2.13 and Triton 3.6; not yet executed on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases import DTYPES, ITEMSIZE, Case, Inputs, check, check_all, inputs
from benchmarks.kernel_floor import two_way as floor_of_two_way
from benchmarks.kernel_masks import Drawing, agreement
from benchmarks.kernel_rivals import Step, rivals, two_way
from benchmarks.timing import Spread
from kernels.launch import run
from kernels.op import using
from kernels.plan import Problem
from kernels.reference import DIRECTIONS, PROMPT_TO_IMAGE

DEVICE = "cuda"
_FLUSH = 256 << 20  # bytes: several times the second-level cache of any GPU so far
_AHEAD = 500_000
"""Clock cycles that the GPU waits before each timed replay, about 0.3 ms: the host has queued everything by
then, and the time between the events is the GPU's alone."""


@dataclass(frozen=True)
class Row:
    """One system on one problem; seconds of a replayed CUDA graph, relative error against float64."""

    system: str
    expressions: int
    warm: Spread
    cold: Spread
    error: float

    def to_json(self) -> dict[str, Any]:
        return {
            "system": self.system,
            "expressions": self.expressions,
            "warm": self.warm.to_json(),
            "cold": self.cold.to_json(),
            "relative_error": self.error,
        }


def correctness(seed: int) -> list[dict[str, Any]]:
    """Every case of `kernel_cases` on the device, and the full-size ones in each dtype."""
    full = [
        Case(problem(count, ITEMSIZE[dtype]), direction, dtype, count > 1, count == 1)
        for dtype in DTYPES
        for count in (1, 8)
        for direction in DIRECTIONS
    ]
    rows = list(check_all(seed, DEVICE))
    return rows + [check(case, seed + index, DEVICE) for index, case in enumerate(full)]


def problem(expressions: int, itemsize: int = 2) -> Problem:
    """SAM's sizes: 13 tokens of each expression against one image of 64 x 64 cells."""
    return Problem(1, expressions, True, 13, 4096, 256, 8, 16, itemsize)


def ours(*sides: Any, direction: str, heads: int) -> Tensor:
    """The kernels as a step of the two-way layer."""
    x, x_position, y, y_position, weights = sides
    return run(x, x_position, y, y_position, weights, direction=direction, heads=heads, eps=1e-5)


def times(counts: tuple[int, ...], seed: int, dtype: str = "bf16") -> Iterator[Row]:
    """Ours and every rival on the two-way block; a rival that cannot run a problem is left out, and named."""
    systems: dict[str, Step] = {"ours": ours, **rivals()}
    for count in counts:
        p = problem(count)
        read, write = (
            inputs(Case(p, d, dtype, False, True), seed + i, DEVICE) for i, d in enumerate(DIRECTIONS)
        )
        with torch.no_grad():
            truth = two_way(_exact, *_arguments(read, write, torch.float64), p.heads).float()
        for name, step in systems.items():
            torch._dynamo.reset()  # its limit of recompilations counts the shapes of all systems together
            try:
                row = _timed(name, count, partial(two_way, step, *_arguments(read, write), p.heads), truth)
            except Exception as refused:
                if name == "ours":
                    raise
                said = (str(refused).splitlines() or [type(refused).__name__])[0]
                print(f"left out {name} at {count} expressions: {said[:120]}", flush=True)
                continue
            yield row


@torch.no_grad()
def _timed(name: str, count: int, body: Callable[[], Tensor], truth: Tensor) -> Row:
    error = float((body().float() - truth).norm() / truth.norm())
    warm, cold = replay(body)
    return Row(name, count, warm, cold, error)


def _exact(*sides: Any, direction: str, heads: int) -> Tensor:
    from kernels.reference import attend_and_norm

    x, x_position, y, y_position, weights = sides
    return attend_and_norm(x, x_position, y, y_position, weights, direction=direction, heads=heads, eps=1e-5)


def _arguments(read: Inputs, write: Inputs, dtype: torch.dtype | None = None) -> tuple[Any, Any, Any]:
    first, second = (one if dtype is None else one.to(dtype=dtype) for one in (read, write))
    return first.sides, first.weights, second.weights


def replay(body: Callable[[], object], repeats: int = 50) -> tuple[Spread, Spread]:
    """Times of `body` as a CUDA graph: with what it reads in the second-level cache, and without."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    scratch = torch.empty(_FLUSH, dtype=torch.uint8, device=DEVICE)

    def measured(flush: bool) -> Spread:
        seconds = []
        for _ in range(repeats + 5):
            torch.cuda._sleep(_AHEAD)
            if flush:
                scratch.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        return Spread.of(seconds[5:])

    return measured(flush=False), measured(flush=True)


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes per second, read and written, of a plain copy."""
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE).zero_()
    target = torch.empty_like(source)
    warm, _ = replay(lambda: target.copy_(source), repeats=20)
    return 2.0 * size / warm.p50


def summary(rows: list[Row], bandwidth: float) -> dict[str, Any]:
    """speedup by number of expressions against the fastest rival; bandwidth_share at the largest number."""
    speedup, best = {}, {}
    counts = sorted({row.expressions for row in rows})
    for count in counts:
        here = {row.system: row.warm.p50 for row in rows if row.expressions == count}
        others = {name: value for name, value in here.items() if name != "ours"}
        if others:
            best[str(count)] = min(others, key=lambda name: others[name])
            speedup[str(count)] = round(min(others.values()) / here["ours"], 3)
    largest = next(row for row in rows if row.system == "ours" and row.expressions == counts[-1])
    moved = floor_of_two_way(problem(counts[-1])).bytes
    return {
        "speedup": speedup,
        "best_rival": best,
        "copy_bandwidth": round(bandwidth),
        "bandwidth_share": round(moved / largest.warm.p50 / bandwidth, 4),
    }


def memory(counts: tuple[int, ...], seed: int) -> dict[str, int]:
    """Bytes allocated at most by prompt to image beside its inputs and outputs, by number of expressions.

    The image's features are shared; were they repeated, this would grow by their size with each expression
    (`benchmarks.kernel_memory`). What does grow are tokens between the kernels.
    """
    found = {}
    for count in counts:
        given = inputs(Case(problem(count), PROMPT_TO_IMAGE, "bf16", False, True), seed, DEVICE)
        call: dict[str, Any] = {"direction": PROMPT_TO_IMAGE, "heads": problem(count).heads}
        with torch.no_grad():
            out = ours(*given.sides, given.weights, **call)  # compiled before memory is counted
            del out
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = ours(*given.sides, given.weights, **call)
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        found[str(count)] = peak - out.numel() * out.element_size()
    return found


def profiled_launches(mode: str) -> int:
    """Kernels of one compiled decoder pass in a mode of `kernels.op`, as the profiler sees them."""
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.kernel_count import Pass, arguments
    from ppcr.model.segmenter import Segmenter, SegmenterConfig

    segmenter = Segmenter(SegmenterConfig()).cuda().half().eval()
    given = tuple(t.cuda().half() for t in arguments(segmenter, 1))
    torch._dynamo.reset()
    with using(mode), torch.no_grad():
        compiled = torch.compile(Pass(segmenter.mask_decoder), fullgraph=True)
        for _ in range(3):
            compiled(*given)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            compiled(*given)
            torch.cuda.synchronize()
    copies = ("Memcpy", "Memset")
    return sum(
        event.count
        for event in profiler.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.key.startswith(copies)
    )


def masks_agree(seed: int, dtype: str = "fp16", most: int = 8) -> tuple[float, float]:
    """Least mask IoU of the segmenter with kernels on and off, and the ratio of their times (off / on)."""
    found = agreement(seed, dtype, DEVICE, most)
    drawing, spent = Drawing(seed, DEVICE, DTYPES[dtype], most), {}
    with torch.no_grad():
        for mode in ("off", "auto"):
            with using(mode):
                spent[mode] = replay(drawing.masks)[0].p50
    return found["iou"], spent["off"] / spent["auto"]
