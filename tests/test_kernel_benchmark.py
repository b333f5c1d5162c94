"""What `python benchmarks/kernel.py` does on a GPU, as far as a CPU can show it.

The rivals compute what the kernels must; the whole of the timed part runs on small shapes with the reference
in the kernels' place and a clock that always says the same. No time is taken and nothing runs on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels are written in Triton")

from benchmarks import kernel, kernel_gpu, kernel_memory
from benchmarks.kernel_cases import Case, inputs
from benchmarks.kernel_resources import SAM
from benchmarks.kernel_rivals import BACKENDS, rivals, two_way
from benchmarks.timing import Spread
from kernels import launch
from kernels.plan import Problem
from kernels.reference import DIRECTIONS

FIGURES = {
    "speedup", "best_rival", "copy_bandwidth", "bandwidth_share", "image_bytes", "read_workspace_bytes",
    "copies_of_image", "masks_iou", "decode_speedup", "decoder_kernels_profiled_before",
    "decoder_kernels_profiled_after",
}  # fmt: skip


def small(expressions: int, itemsize: int = 2) -> Problem:
    return Problem(1, expressions, True, 5, 48, 32, 2, 16, itemsize)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda form, **options: form)


@pytest.mark.parametrize("count", [1, 3])
def test_rivals_compute_the_same(count: int) -> None:
    p = small(count, 4)
    read, write = (
        inputs(Case(p, d, "fp32", False, True), torch.seed() % 2**31).to(dtype=torch.float64)
        for d in DIRECTIONS
    )
    given = read.sides, read.weights, write.weights, p.heads
    wanted = two_way(kernel_gpu._exact, *given)
    found = {}
    for name, step in rivals().items():
        try:
            found[name] = two_way(step, *given)
        except RuntimeError:
            assert name in BACKENDS  # that one is not for CPUs
    assert {"compiled_reference", "compiled_plain", "compiled_sdpa", "compiled_flex", "sdpa_math"} <= set(
        found
    )
    for out in found.values():
        torch.testing.assert_close(out, wanted)


def replay(body: Callable[[], object], repeats: int = 50) -> tuple[Spread, Spread]:
    for _ in range(2):
        body()
    return Spread(1e-4, 1e-4, 1e-4, repeats), Spread(2e-4, 2e-4, 2e-4, repeats)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`kernel_gpu` on a CPU."""
    monkeypatch.setattr(kernel_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(kernel_gpu, "problem", small)
    monkeypatch.setattr(kernel_gpu, "replay", replay)
    monkeypatch.setattr(kernel_gpu, "ours", kernel_gpu._exact)
    monkeypatch.setattr(kernel_gpu, "profiled_launches", lambda mode: {"off": 96, "auto": 30}[mode])
    monkeypatch.setattr(kernel_gpu, "agreement", lambda *given: {"iou": 0.9997})
    monkeypatch.setattr(kernel_gpu, "copy_bandwidth", lambda: 4e12)
    peaks = iter((0, 1000, 0, 1400, 0, 4200))
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: next(peaks))


def test_the_timed_part_ends_with_every_figure(
    gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary: dict[str, Any] = {}
    record: dict[str, Any] = {}
    kept: list[int] = []
    parts = kernel.Parts(lambda: kept.append(len(record.get("rows", []))))
    kernel._timed(3, summary, record, parts)
    assert parts.failed == {} and set(summary) == FIGURES
    assert summary["speedup"] == {"1": 1.0, "8": 1.0, "64": 1.0} and summary["masks_iou"] == 0.9997
    assert {row["system"] for row in record["rows"]} >= {"ours", "compiled_sdpa", "compiled_flex"}
    assert all(row["relative_error"] < 0.02 for row in record["rows"])
    assert len(kept) >= 7 and kept[-1] == len(record["rows"])
    json.dumps({**record, "summary": summary})
    assert "left out" in capsys.readouterr().out  # some of torch's backends are not for CPUs


def test_a_part_that_fails_is_named_and_costs_no_other(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **settings: Any) -> Tensor:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(kernel_gpu, "ours", broken)
    summary: dict[str, Any] = {}
    parts = kernel.Parts(lambda: None)
    kernel._timed(3, summary, {}, parts)
    assert set(parts.failed) == {"times", "memory"} and "no kernel image" in parts.failed["times"]
    assert summary["masks_iou"] == 0.9997 and "speedup" not in summary
    assert summary["decoder_kernels_profiled_before"] == 96


def test_copies_of_the_image_are_counted() -> None:
    image = 4096 * 256 * 2
    repeated = {"1": 1000, "8": 1000 + 7 * image, "64": 1000 + 63 * image}
    assert kernel_memory.copies_of_image(repeated, SAM) == 1.0
    assert kernel_memory.copies_of_image({"1": 1000, "64": 1000}, SAM) == 0.0


def test_what_is_made_is_counted_once_and_what_was_there_is_not() -> None:
    there = torch.zeros(100)
    with kernel_memory.Allocations([there]) as counted:
        made = there + 1
        made.view(10, 10).add_(1)
        there.mul_(2)
        del made
        torch.empty(7, dtype=torch.float64)
    assert counted.bytes == 100 * 4 + 7 * 8


@pytest.mark.parametrize("cells", [1024, 4096, 16384])
def test_expressions_share_the_image_in_the_first_block(cells: int) -> None:
    p = replace(SAM, cells=cells)
    taken = kernel_memory.by_expressions(lambda count: replace(p, prompts=count), (1, 3, 17))
    assert all(taken.values())
    # Tokens and their parts of the sums are all that an expression adds.
    assert kernel_memory.copies_of_image(taken, p) < 0.25


def test_an_image_that_is_repeated_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    run = launch.run

    def wasteful(x: Tensor, x_position: Tensor, y: Tensor, *others: Any, **settings: Any) -> Tensor:
        return run(x, x_position, y.expand(-1, x.shape[1], -1, -1).contiguous(), *others, **settings)

    monkeypatch.setattr(launch, "run", wasteful)
    taken = kernel_memory.by_expressions(lambda count: replace(SAM, prompts=count), (2, 5))
    assert kernel_memory.copies_of_image(taken, SAM) > 1
