"""What each stage takes at least on this machine: its weights read, its products computed, at measured rates.

A floor is the longer of two times: the stage's weights, read once a forward call, at the copy bandwidth of a
working set of their size; its FLOPs at the matrix rate of its precision. Activations, the KV cache and every
launch are left out, so that nothing can be faster.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.rates import Rates
from benchmarks.tracing import Trace
from benchmarks.workers import environment, failure, last_line
from ppcr.manifest import WEIGHTS

ROLES = {
    "vision": "vision", "semantic": "decoder", "spatial": "decoder", "encoder": "image_encoder",
    "decoder": "mask_decoder",
}  # fmt: skip
"""Stage -> the graph that it runs."""
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1, "int4": 0.5}


@dataclass(frozen=True)
class Floor:
    """One stage.

    Attributes:
        flops: of one request. bytes: of weights, all forward calls together. calls: forward calls.
        reading_s, computing_s: what they take; floor_s: the longer.
        measured_s: median of the stage at work. ratio: of it to the floor.
    """

    stage: str
    flops: float
    bytes: float
    calls: float
    reading_s: float
    computing_s: float
    measured_s: float

    @property
    def floor_s(self) -> float:
        return max(self.reading_s, self.computing_s)

    @property
    def ratio(self) -> float:
        return self.measured_s / self.floor_s

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "floor_s": self.floor_s, "ratio": round(self.ratio, 3)}


def by_stage(weights: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the graph of each stage and of the weights beside it, from those of each role."""
    return {stage: weights[role] + weights.get(f"{role}{WEIGHTS}", 0) for stage, role in ROLES.items()}


def scaled(size: float, stored: str, computed: str) -> float:
    """``size`` bytes of weights stored at one precision, as an engine that computes in another holds them."""
    return size * _BYTES[computed] / _BYTES[stored]


def floors(
    work: Mapping[str, Mapping[str, float]],
    held: Mapping[str, float],
    traces: Sequence[Trace],
    measured: Mapping[str, float],
    rates: Rates,
    precision: str,
) -> list[Floor]:
    """The floor of every stage of a first request that was measured.

    work: as `benchmarks.card.flops`. held: bytes of weights by stage. traces: of requests, for the mean
    forward calls of each turn. measured: seconds at work by stage. precision: that the stages compute in.
    """
    found = []
    for stage in ROLES:
        if stage not in measured:
            continue
        flops = work["decoder (one mask)" if stage == "decoder" else stage]["first"]
        calls = _calls(traces, stage) if ROLES[stage] == "decoder" else 1.0
        reading = calls * held[stage] / rates.bandwidth(round(held[stage]))
        computing = flops / rates.operations(precision)
        found.append(Floor(stage, flops, calls * held[stage], calls, reading, computing, measured[stage]))
    return found


def _calls(traces: Sequence[Trace], stage: str) -> float:
    """Mean forward calls in a stage, of the requests that had it; 0 where none had."""
    counts = [trace.calls(stage) for trace in traces if trace.calls(stage)]
    return fmean(counts) if counts else 0.0


def measure_rates(device: str, threads: int, sizes: Sequence[int]) -> Rates:
    """Rates of this machine, by a fresh process with the rows' own environment.

    Raises:
        PPCRError: the process ended with an error.
    """
    command = [sys.executable, str(Path(__file__).with_name("rates.py")), device, str(threads)]
    run = subprocess.run(
        [*command, ",".join(map(str, sizes))], text=True, capture_output=True, env=environment(threads)
    )
    if run.returncode:
        raise failure(run.returncode, run.stderr, "the machine's rates")
    return Rates.from_json(last_line(run.stdout))


def rates_lines(rates: Rates) -> list[str]:
    """The measured rates as text."""
    copies = ", ".join(f"{rate / 1e9:.1f} GB/s at {size / 1e6:.0f} MB" for size, rate in rates.copy)
    products = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.matrix.items())
    where = "GPU" if rates.device == "cuda" else f"CPU, threads: {rates.threads}"
    return [f"copies ({where}): {copies}", f"matrix products, GFLOP/s: {products}"]


def table(system: str, found: Sequence[Floor], end_to_end_s: float) -> list[str]:
    """Stage, work, weights, both times, measured and ratio; the sum of the floors against the whole."""
    lines = [
        f"floor of {system}",
        f"{'stage':<10}{'MFLOP':>10}{'MB read':>10}{'calls':>7}{'compute ms':>12}{'read ms':>10}"
        f"{'floor ms':>10}{'at work ms':>12}{'ratio':>8}",
    ]
    for one in found:
        lines.append(
            f"{one.stage:<10}{one.flops / 1e6:>10.1f}{one.bytes / 1e6:>10.1f}{one.calls:>7.1f}"
            f"{1e3 * one.computing_s:>12.3f}{1e3 * one.reading_s:>10.3f}{1e3 * one.floor_s:>10.3f}"
            f"{1e3 * one.measured_s:>12.3f}{one.ratio:>7.1f}x"
        )
    whole, flops = sum(one.floor_s for one in found), sum(one.flops for one in found)
    lines.append(
        f"{'all':<10}{flops / 1e6:>10.1f}{sum(one.bytes for one in found) / 1e6:>10.1f}"
        f"{'':>7}{'':>12}{'':>10}{1e3 * whole:>10.3f}{1e3 * end_to_end_s:>12.3f}{end_to_end_s / whole:>7.1f}x"
        "  (end to end, median)"
    )
    return lines


def to_json(found: Sequence[Floor], end_to_end_s: float) -> dict[str, Any]:
    """Floors of one row, and the whole request against their sum."""
    whole = sum(one.floor_s for one in found)
    return {
        "stages": {one.stage: one.to_json() for one in found},
        "floors_s": whole,
        "end_to_end_ratio": round(end_to_end_s / whole, 3),
    }
