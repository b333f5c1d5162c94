"""What prompt-feature attention costs at least: FLOPs, bytes, and the time they take a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.plan import Problem
from kernels.reference import DIRECTIONS, PROMPT_TO_IMAGE


@dataclass(frozen=True)
class Device:
    """Rates a floor is counted with: dense 16-bit FLOP/s and bytes/s of memory."""

    name: str
    flops: float
    bandwidth: float


H200 = Device("H200", 790e12, 4.3e12)


@dataclass(frozen=True)
class Floor:
    """FLOPs (a multiplication and an addition are two), bytes that must move, and what a device needs."""

    flops: float
    bytes: float

    def __add__(self, other: Floor) -> Floor:
        return Floor(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, device: Device = H200) -> float:
        return max(self.flops / device.flops, self.bytes / device.bandwidth)


def floor_of(p: Problem, direction: str) -> Floor:
    """The cheapest known order of the products, every tensor moved once.

    FLOPs: the smaller of projecting the cells and folding the projections into the tokens, in each direction.
    Bytes: the features that lie in memory, position, tokens and weights are read; the answer is written.
    """
    rows, heads, d, c, inner = p.expressions * p.tokens, p.heads, p.head_dim, p.dim, p.inner
    tokens = 2.0 * rows * c * inner
    folded = 4.0 * rows * heads * c * p.cells + 4.0 * tokens
    scores = 4.0 * rows * inner * p.cells
    if direction == PROMPT_TO_IMAGE:
        projected = 4.0 * p.features * p.cells * c * inner + scores + 2.0 * tokens
        written = rows * c
    else:
        # Only the query projection is the same for all expressions of an image.
        projected = 2.0 * (p.features + p.expressions) * p.cells * c * inner + scores + 2.0 * tokens
        written = p.expressions * p.cells * c
    read = p.features * p.cells * c + p.cells * c + 2 * rows * c + 4 * c * (heads * d)
    return Floor(min(folded, projected), float(p.itemsize) * (read + written))


def two_way(p: Problem) -> Floor:
    """Both directions of one two-way layer."""
    return floor_of(p, DIRECTIONS[0]) + floor_of(p, DIRECTIONS[1])
