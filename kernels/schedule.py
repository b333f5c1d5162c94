"""What one attention launches on a GPU, as data: kernels in order, their grids, arguments and workspaces.

The number of expressions may be a number, or `EXPRESSIONS`, for code that is compiled before it is known: all
that follows from it is then an `Each`, which a host without torch or Triton can work out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kernels.plan import (
    TOKEN_BLOCK,
    Problem,
    ReadPlan,
    Variant,
    WritePlan,
    ceil,
    read_variants,
    write_variants,
)

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Each:
    """A number that grows with the expressions: expressions * times / over, rounded up."""

    times: int = 1
    over: int = 1

    def __mul__(self, factor: int) -> Each:
        return Each(self.times * factor, self.over)

    __rmul__ = __mul__


EXPRESSIONS = Each()
Number = int | Each
Arguments = tuple[str | Number | float | None, ...]


def blocks(count: Number, size: int) -> Number:
    """How many blocks of ``size`` hold ``count``."""
    return Each(count.times, count.over * size) if isinstance(count, Each) else ceil(count, size)


@dataclass(frozen=True)
class Step:
    """One launch. arguments are those of the kernel in its order: a name is a tensor, None is left out.

    All kernels take tensors that they read, then numbers, then tensors that they write: the order of
    TensorRT's ahead-of-time plugins.
    """

    name: str
    variant: Variant
    grid: tuple[Number, ...]
    arguments: Arguments


@dataclass(frozen=True)
class Workspace:
    """A tensor between two kernels: its shape, and whether it is fp32 or of the inputs' own type."""

    shape: tuple[Number, ...]
    wide: bool


@dataclass(frozen=True)
class Layout:
    """Where the operands lie.

    expressions: of all images together. group: of them that read one image. features: images in memory.
    common_tokens, common_cells: one position serves all expressions, or all images.
    masked: padded tokens; after: a summand of the result.
    """

    expressions: Number
    group: Number
    features: Number
    common_tokens: bool
    common_cells: bool
    masked: bool = False
    after: bool = False


@dataclass(frozen=True)
class Schedule:
    """The launches of one attention and the workspaces between them."""

    workspaces: dict[str, Workspace]
    steps: tuple[Step, ...]


def read_schedule(p: Problem, plan: ReadPlan, at: Layout, eps: float) -> Schedule:
    """Prompt to image.

    Tensors: the operands of `kernels.reference` by name, "tokens" and "image" for x and y, with "mask",
    "after" and "out"; without folding also "q", "k" and "v", which are projected before.
    """
    e, n, m = at.expressions, p.tokens, p.cells
    rows = at.group * n * (p.heads if plan.folded else 1)
    variants = read_variants(p, plan, mask=at.masked, after=at.after)
    spaces = {
        "part": Workspace((e, plan.splits, n, p.inner), wide=True),
        "lse": Workspace((e, plan.splits, n, p.heads), wide=True),
    }
    row_blocks, scale = blocks(rows, plan.block_rows), LOG2_E / math.sqrt(p.head_dim)
    steps: list[Step] = []
    read: Arguments
    grid: tuple[Number, ...]
    if plan.folded:
        spaces["folded"] = Workspace((e, p.heads, n, p.dim), wide=False)
        weights = "q_weight", "q_bias", "k_weight", None, None, None, None
        steps.append(_fold(p, at, variants["fold"], weights, ("folded", None, None)))
        place = 0 if at.common_cells else m * p.dim
        folded = "folded", "image", "image_position", "v_weight"
        read = (*folded, rows, n, m, plan.splits, at.group, place, "part", "lse")
        grid = row_blocks, plan.splits, at.features
    else:
        read = "q", "k", "v", rows, n, m, scale, plan.splits, at.group, "part", "lse"
        grid = row_blocks, plan.splits, at.features * p.heads
    steps.append(Step("read", variants["read"], grid, read))
    merged = "part", "lse", "v_bias", "out_weight", "out_bias", "tokens", "norm_weight", "norm_bias"
    last = (*merged, *_optional(at), n, eps, "out")
    steps.append(Step("merge", variants["merge"], (ceil(n, TOKEN_BLOCK), e), last))
    return Schedule(spaces, tuple(steps))


def write_schedule(p: Problem, plan: WritePlan, at: Layout, eps: float) -> Schedule:
    """Image to prompt: "image" and "tokens" are x and y, else as in `read_schedule`; "k" and "v" alone are
    projected before."""
    e, n, m = at.expressions, p.tokens, p.cells
    variants = write_variants(p, plan, mask=at.masked, after=at.after)
    groups = at.group, e if at.common_cells else at.group
    mask, after = _optional(at)
    close = "out_bias", "norm_weight", "norm_bias", after, n, m
    grid = ceil(m, plan.block_cells), e
    if not plan.folded:
        scale = LOG2_E / math.sqrt(p.head_dim)
        heads = "image", "image_position", "q_weight", "q_bias", "k", "v", mask, "out_weight"
        write: Arguments = (*heads, *close, scale, eps, *groups, "out")
        return Schedule({}, (Step("write", variants["write"], grid, write),))
    spaces = {
        "folded": Workspace((e, p.heads, n, p.dim), wide=False),
        "value": Workspace((e, p.heads, n, p.dim), wide=False),
        "bias": Workspace((e, p.heads, n), wide=True),
    }
    weights = "k_weight", "k_bias", "q_weight", "q_bias", "v_weight", "v_bias", "out_weight"
    fold = _fold(p, at, variants["fold"], weights, ("folded", "bias", "value"))
    write = ("image", "image_position", "folded", "bias", "value", *close, eps, *groups, "out")
    return Schedule(spaces, (fold, Step("write", variants["write"], grid, write)))


def _fold(p: Problem, at: Layout, variant: Variant, weights: Arguments, written: Arguments) -> Step:
    stride = 0 if at.common_tokens else p.tokens * p.dim
    tokens = "tokens", "token_position", _optional(at)[0]
    arguments = (*tokens, *weights, p.tokens, LOG2_E / math.sqrt(p.head_dim), stride, *written)
    return Step("fold", variant, (p.heads, ceil(p.tokens, TOKEN_BLOCK), at.expressions), arguments)


def _optional(at: Layout) -> tuple[str | None, str | None]:
    return "mask" if at.masked else None, "after" if at.after else None
