"""Which kernels run a problem, and with which tiles: plain arithmetic, the same with and without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_DIMS = (16, 32, 64)
MAX_WIDTH = 256
BALANCE = 180
"""FLOPs of 16-bit matrix work in the time of one byte of memory traffic (H200: 790 TFLOP/s, 4.3 TB/s)."""


def fits(dim: int, heads: int, head_dim: int) -> bool:
    """Whether the kernels have tiles for these widths: powers of two up to 256, head_dim 16, 32 or 64."""
    widths = dim, heads * head_dim
    return head_dim in HEAD_DIMS and all(
        16 <= width <= MAX_WIDTH and width & (width - 1) == 0 for width in widths
    )


@dataclass(frozen=True)
class Problem:
    """Sizes of one attention between prompts and image.

    images, prompts: B images with K expressions each; shared: the K expressions of an image read one and the
    same image; tokens of an expression; cells of an image; dim C; heads H of head_dim D; itemsize in bytes.
    """

    images: int
    prompts: int
    shared: bool
    tokens: int
    cells: int
    dim: int
    heads: int
    head_dim: int
    itemsize: int

    @property
    def expressions(self) -> int:
        return self.images * self.prompts

    @property
    def group(self) -> int:
        """Expressions that read one image."""
        return self.prompts if self.shared else 1

    @property
    def features(self) -> int:
        """Images that lie in memory."""
        return self.expressions // self.group

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim


@dataclass(frozen=True)
class ReadPlan:
    """Prompt to image. rows: queries of one image; block_rows by block_cells are scored at a time."""

    folded: bool
    rows: int
    block_rows: int
    block_cells: int
    splits: int
    chunk: int
    warps: int
    stages: int


@dataclass(frozen=True)
class WritePlan:
    """Image to prompt: block_cells by block_tokens are scored at a time."""

    folded: bool
    block_cells: int
    block_tokens: int
    warps: int
    stages: int


def plan_read(problem: Problem, processors: int = 132) -> ReadPlan:
    """Fold where few queries read an image: K and V of all cells are then neither computed nor stored."""
    p = problem
    rows = p.group * p.tokens * p.heads
    folding = 4 * rows * p.dim
    projecting = 4 * p.dim * p.inner + 4 * rows * p.head_dim + BALANCE * 4 * p.inner * p.itemsize
    folded = folding <= projecting
    wide = p.itemsize == 4
    if folded:
        block_rows = tile(rows, most=32 if wide else 64)
        block_cells = 16 if wide and p.dim > 128 else 32 if wide or p.dim > 128 else 64
        row_blocks = ceil(rows, block_rows) * p.features
    else:
        rows = p.group * p.tokens
        block_rows, block_cells = tile(rows, most=64), 32 if wide else 64
        row_blocks = ceil(rows, block_rows) * p.features * p.heads
    # Two programs for each processor, but no chunk without a cell.
    blocks = ceil(p.cells, block_cells)
    splits = min(blocks, max(1, 2 * processors // row_blocks))
    chunk = ceil(blocks, splits) * block_cells
    warps = 4 if folded or not wide else 2
    return ReadPlan(folded, rows, block_rows, block_cells, ceil(p.cells, chunk), chunk, warps, 2)


def plan_write(problem: Problem) -> WritePlan:
    """Fold where an expression has no more tokens than a head has columns: that is less work as well."""
    p = problem
    wide = p.itemsize == 4
    block_tokens = tile(p.tokens, most=64)
    folded = p.tokens <= block_tokens <= p.head_dim
    block_cells = 16 if wide else 64
    return WritePlan(folded, block_cells, block_tokens, 8 if p.dim > 128 else 4, 1 if wide else 2)


def tile(count: int, *, most: int) -> int:
    """The power of two from 16 to `most` that holds `count`, or `most`."""
    return min(most, max(16, 1 << (count - 1).bit_length()))


def ceil(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
