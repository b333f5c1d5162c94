"""``python benchmarks/kernel.py``: the prompt-feature attention kernels: floor, correctness, resources,
times.

Prints the card first: FLOPs, bytes and the least time of each problem. Without a GPU the kernels run in
Triton's interpreter against a float64 reference and are compiled ahead of time; nothing is timed, and the
output says so. On a GPU every kernel runs there in each dtype, and is timed as replayed CUDA graphs, with a
warm and a cold cache, beside torch's attention backends, torch.compile and FlexAttention. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import machine, results
from benchmarks.kernel_cases import BOUNDS, DTYPES
from benchmarks.kernel_count import decoder_kernels
from benchmarks.kernel_floor import H200, floor_of, two_way
from benchmarks.kernel_masks import LEAST_IOU
from benchmarks.kernel_memory import by_expressions, copies_of_image
from benchmarks.kernel_resources import (
    SAM,
    SAM_LONG,
    SHIPPED,
    TARGETS,
    compiled,
    resource_table,
    resources,
)  # fmt: skip
from kernels.plan import Problem
from kernels.reference import DIRECTIONS
from ppcr.errors import CommandParser, EngineError, ParityError, UsageError, run_cli

ROOT = Path(__file__).resolve().parents[1]
UNTIMED = "compiled for sm_90, checked in the interpreter, not yet timed"
COUNTS = (1, 8, 64)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    made = CommandParser(description="The prompt-feature attention kernels: floor, correctness, times.")
    made.add_argument("--seed", type=int, metavar="N", help="of the inputs (default: a fresh one)")
    made.add_argument(
        "--targets", type=int, nargs="+", metavar="CC", choices=TARGETS,
        help="compute capabilities to compile for (default: 80 90 120, on a GPU its own)",
    )  # fmt: skip
    made.add_argument(
        "--save", nargs="?", const="kernel", metavar="NAME", help="write results/NAME.json (default: kernel)"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_cli(lambda: _kernel(parser().parse_args(words), words))


def _kernel(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    results.check_name(arguments.save)
    if importlib.util.find_spec("triton") is None:
        raise EngineError("the kernels need triton: pip install 'triton>=3.6,<4'")
    if arguments.seed is not None and arguments.seed < 0:
        raise UsageError(f"--seed must be 0 or more, not {arguments.seed}")
    seed = int.from_bytes(os.urandom(3)) if arguments.seed is None else arguments.seed
    on_gpu, described = torch.cuda.is_available(), machine.describe()
    if on_gpu:
        described |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    described |= {"triton": importlib.metadata.version("triton")}
    print(*card(), sep="\n")
    print("machine  " + ", ".join(f"{name} {value}" for name, value in described.items()))
    print(f"where    {'GPU' if on_gpu else 'no GPU: ' + UNTIMED}; seed {seed}", flush=True)

    summary: dict[str, Any] = {"device": described.get("gpu", "cpu"), "timed": on_gpu, "seed": seed}
    record: dict[str, Any] = {}

    def keep() -> None:
        if arguments.save is not None:
            results.save(arguments.save, "kernel.py", words, described, {**record, "summary": summary})

    part = Parts(keep) if on_gpu else _at_once
    errors = _on_gpu(seed) if on_gpu else interpreted(seed)
    record["errors"] = errors
    summary["max_relative_error"] = worst(errors)
    print(*error_table(errors), sep="\n", flush=True)
    good = all(value <= BOUNDS[name] for name, value in summary["max_relative_error"].items())
    # A time does not count while an error is out of its bound.
    if isinstance(part, Parts):
        summary["failed"] = part.failed
        keep()
        if good:
            _timed(seed, summary, record, part)
    for key, mode in (("decoder_kernels_before", "off"), ("decoder_kernels_after", "op")):
        count = part(key, partial(decoder_kernels, mode))
        summary[key], record[key] = (count.total, asdict(count)) if count else (None, None)
    if not on_gpu:
        _memory(summary, lambda: by_expressions(lambda count: replace(SAM, prompts=count), COUNTS))
        record["masks"] = interpreted(seed, "kernel_masks")
        summary["masks_iou"] = min(row["iou"] for row in record["masks"])
        good = good and summary["masks_iou"] >= LEAST_IOU
    targets = arguments.targets or _targets(on_gpu)
    record["resources"] = rows = part("resources", partial(resources, targets)) or []
    summary["compiled"] = compiled(rows)
    print(*resource_table(rows), sep="\n", flush=True)
    keep()
    print(json.dumps(summary))
    if not good:
        told = {name: summary.get(name) for name in ("max_relative_error", "masks_iou")}
        raise KernelError(f"a kernel is off by more than its bound: {told}")
    return 0


class KernelError(ParityError):
    """A kernel disagrees with its reference."""


class Parts:
    """Time on a GPU is scarce and may end: a part that fails is named in ``failed`` and does not cost the
    others, and what there is by then is kept after each."""

    def __init__(self, keep: Callable[[], None]) -> None:
        self.failed: dict[str, str] = {}
        self._keep = keep

    def __call__(self, name: str, body: Callable[[], Any]) -> Any:
        """What ``body`` returns, None where it fails."""
        try:
            return body()
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}"[:300]
            print(f"note     {name} failed: {self.failed[name]}", flush=True)
            return None
        finally:
            self._keep()


def _at_once(name: str, body: Callable[[], Any]) -> Any:
    return body()


def card() -> list[str]:
    """FLOPs, bytes and floor of each problem."""
    lines = [f"{'problem':<36}{'GFLOP':>9}{'MB':>9}{'floor, us (' + H200.name + ')':>20}"]
    for name, problem in (("shipped", SHIPPED), ("SAM", SAM), ("SAM, 133 tokens", SAM_LONG)):
        for direction in DIRECTIONS:
            floor = floor_of(problem, direction)
            lines.append(_card_line(f"{name}, {direction}", floor.flops, floor.bytes, floor.seconds()))
    for count in COUNTS:
        floor = two_way(Problem(1, count, True, *_sizes(SAM)))
        lines.append(_card_line(f"SAM, both, {count} expressions", floor.flops, floor.bytes, floor.seconds()))
    return lines


def _sizes(p: Problem) -> tuple[int, int, int, int, int, int]:
    return p.tokens, p.cells, p.dim, p.heads, p.head_dim, p.itemsize


def _card_line(name: str, flops: float, size: float, seconds: float) -> str:
    return f"  {name:<34}{flops / 1e9:>9.3f}{size / 1e6:>9.2f}{seconds * 1e6:>20.2f}"


def interpreted(seed: int, part: str = "kernel_cases", *options: str) -> list[dict[str, Any]]:
    """The rows of ``kernel_cases`` or ``kernel_masks`` in Triton's interpreter, in a process of its own: the
    switch works only before the import.

    Raises:
        KernelError: the process did not come to an end.
    """
    command = [sys.executable, "-m", f"benchmarks.{part}", "--seed", str(seed), *options]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    if done.stderr.strip() and done.returncode not in (0, 1):
        raise KernelError(f"the interpreter stopped: {done.stderr.strip().splitlines()[-1]}")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if not rows:
        raise KernelError(f"the interpreter ran no case: {done.stderr.strip()[-300:]}")
    return rows


def _targets(on_gpu: bool) -> Sequence[int]:
    if not on_gpu:
        return TARGETS
    major, minor = torch.cuda.get_device_capability()
    return [10 * major + minor] if 10 * major + minor in TARGETS else TARGETS


def _on_gpu(seed: int) -> list[dict[str, Any]]:
    from benchmarks.kernel_gpu import correctness

    return correctness(seed)


def worst(errors: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The largest relative error of each dtype; NaN counts as infinite."""
    return {
        name: max(
            (row["error"] if row["error"] == row["error"] else float("inf"))
            for row in errors
            if row["dtype"] == name
        )
        for name in DTYPES
    }


def error_table(errors: Sequence[dict[str, Any]]) -> list[str]:
    """The errors as text, each beside that of plain torch in the same dtype."""
    lines = [f"{'case':<70}{'error':>10}{'torch':>10}"]
    return lines + [f"  {row['case']:<68}{row['error']:>10.1e}{row['torch_error']:>10.1e}" for row in errors]


def _timed(seed: int, summary: dict[str, Any], record: dict[str, Any], part: Parts) -> None:
    """Everything that needs a GPU, into `summary` and `record`."""
    from benchmarks import kernel_gpu as gpu

    rows: list[gpu.Row] = []

    def times() -> None:
        for row in gpu.times(COUNTS, seed):
            rows.append(row)
            record["rows"] = [each.to_json() for each in rows]
            print(
                f"  {row.system:<20}{row.expressions:>4} expressions  warm {row.warm.p50 * 1e6:>8.1f} us  "
                f"cold {row.cold.p50 * 1e6:>8.1f} us  error {row.error:.1e}",
                flush=True,
            )

    bandwidth = part("copy bandwidth", gpu.copy_bandwidth)
    part("times", times)
    if rows and bandwidth:
        summary |= part("summary", lambda: gpu.summary(rows, bandwidth)) or {}
    _memory(summary, lambda: part("memory", lambda: gpu.memory(COUNTS, seed)))
    masks = part("masks", lambda: gpu.masks_agree(seed))
    summary["masks_iou"], summary["decode_speedup"] = masks or (None, None)
    for key, mode in (("before", "off"), ("after", "auto")):
        name = f"decoder_kernels_profiled_{key}"
        summary[name] = part(name, partial(gpu.profiled_launches, mode))


def _memory(summary: dict[str, Any], taken: Callable[[], dict[str, int] | None]) -> None:
    """What prompt to image takes by number of expressions: measured on a GPU, counted elsewhere."""
    summary["image_bytes"] = SAM.cells * SAM.dim * SAM.itemsize
    summary["read_workspace_bytes"] = found = taken()
    if found:
        summary["copies_of_image"] = copies_of_image(found, SAM)
        listed = ", ".join(f"{count}: {size / 1e6:.2f} MB" for count, size in found.items())
        print(f"memory   of prompt to image beside inputs and result, by expressions: {listed}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
