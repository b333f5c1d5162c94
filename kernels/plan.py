"""Which kernels run a problem, and with which tiles: plain arithmetic, the same with and without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

HEAD_DIMS = (16, 32, 64)
MAX_WIDTH = 256
MAX_TOKENS = 64
"""Most tokens of an expression that are one tile."""

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


def plan_read(problem: Problem, processors: int = 132, *, folded: bool | None = None) -> ReadPlan:
    """Fold where few queries read an image: K and V of all cells are then neither computed nor stored.

    ``folded`` overrules that.
    """
    p = problem
    rows = p.group * p.tokens * p.heads
    folding = 4 * rows * p.dim
    projecting = 4 * p.dim * p.inner + 4 * rows * p.head_dim + BALANCE * 4 * p.inner * p.itemsize
    if folded is None:
        folded = folding <= projecting
    wide = p.itemsize == 4
    if folded:
        block_rows = tile(rows, most=32 if wide else 64)
        block_cells = 16 if wide and p.dim > 128 else 32 if wide or p.dim > 128 else 64
        warps = 8  # four would spill a few registers at 128 columns on sm_80 and sm_120
        row_blocks = ceil(rows, block_rows) * p.features
    else:
        rows = p.group * p.tokens
        block_rows, block_cells, warps = tile(rows, most=32 if wide else 64), 32 if wide else 64, 4
        row_blocks = ceil(rows, block_rows) * p.features * p.heads
    # Two programs for each processor, but no chunk without a cell.
    blocks = ceil(p.cells, block_cells)
    splits = min(blocks, max(1, 2 * processors // row_blocks))
    chunk = ceil(blocks, splits) * block_cells
    stages = 1 if folded and wide else 2
    return ReadPlan(folded, rows, block_rows, block_cells, ceil(p.cells, chunk), chunk, warps, stages)


def plan_write(problem: Problem, *, folded: bool | None = None) -> WritePlan:
    """Fold where an expression has no more tokens than a head has columns: that is less work as well.

    ``folded`` overrules that, for at most `most_folded`.
    """
    p = problem
    wide = p.itemsize == 4
    block_tokens = tile(p.tokens, most=MAX_TOKENS)
    if folded is None:
        folded = p.tokens <= block_tokens <= min(p.head_dim, most_folded(p.dim))
    # Half the cells where accumulators, queries and weights together would not fit the registers; half the
    # tokens where fp32 keys and values would not.
    block_cells = 16 if wide else 32 if not folded and p.dim > 128 else 64
    if wide and not folded:
        block_tokens = min(block_tokens, MAX_TOKENS // 2)
    warps = 4 if p.dim <= (128 if folded or wide else 64) else 8
    return WritePlan(folded, block_cells, block_tokens, warps, 2)


def most_folded(dim: int) -> int:
    """Most tokens whose folded rows are one tile: of 256 columns fewer fit registers and shared memory."""
    return MAX_TOKENS if dim <= 128 else MAX_TOKENS // 2


def tile(count: int, *, most: int) -> int:
    """The power of two from 16 to `most` that holds `count`, or `most`."""
    return min(most, max(16, 1 << (count - 1).bit_length()))


def ceil(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


TOKEN_BLOCK, SPLIT_BLOCK = 16, 4


def columns(dim: int, itemsize: int) -> int:
    """How many of a row's columns a product takes at a time: of fp32, no more than fit the registers."""
    return min(dim, 32) if itemsize == 4 else dim


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel: its constants, warps and pipeline stages."""

    kernel: str
    constants: dict[str, int | bool]
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, int | bool]:
        """What a launch says beside the arguments."""
        return {**self.constants, "num_warps": self.warps, "num_stages": self.stages}


def read_variants(
    p: Problem, plan: ReadPlan, *, mask: bool = False, after: bool = False
) -> dict[str, Variant]:
    """The kernels that run `plan`, in order."""
    widths = {"H": p.heads, "D": p.head_dim}
    blocks = {"BR": plan.block_rows, "BM": plan.block_cells, "CHUNK": plan.chunk}
    closing = {
        "C": p.dim,
        "BT": TOKEN_BLOCK,
        "BJ": min(64, p.inner),
        "SPLITS": plan.splits,
        "BS": SPLIT_BLOCK,
    }
    closing |= {"HAS_MASK": mask, "HAS_AFTER": after}
    merge = Variant("merge", widths | closing, 8)
    if not plan.folded:
        return {"read": Variant("read_heads", widths | blocks, plan.warps, plan.stages), "merge": merge}
    values = min(16 if p.itemsize == 4 else 64, p.inner)
    wide = widths | blocks | {"C": p.dim, "BV": values, "BK": columns(p.dim, p.itemsize)}
    return {
        "fold": _fold(p, mask, values=False),
        "read": Variant("read_folded", wide, plan.warps, plan.stages),
        "merge": merge,
    }


def write_variants(
    p: Problem, plan: WritePlan, *, mask: bool = False, after: bool = False
) -> dict[str, Variant]:
    """The kernels that run `plan`, in order."""
    blocks = {"H": p.heads, "C": p.dim, "BM": plan.block_cells, "BN": plan.block_tokens, "HAS_AFTER": after}
    blocks |= {"BK": columns(p.dim, p.itemsize)}
    if plan.folded:
        write = Variant("write_folded", dict(blocks), plan.warps, plan.stages)
        return {"fold": _fold(p, mask, values=True), "write": write}
    more = {"D": p.head_dim, "BLOCKS": ceil(p.tokens, plan.block_tokens), "HAS_MASK": mask}
    return {"write": Variant("write_heads", blocks | more, plan.warps, plan.stages)}


def _fold(p: Problem, mask: bool, *, values: bool) -> Variant:
    sizes = {"H": p.heads, "D": p.head_dim, "C": p.dim, "BT": TOKEN_BLOCK, "BK": columns(p.dim, p.itemsize)}
    constants = sizes | {"HAS_MASK": mask, "HAS_VALUES": values}
    # In fp32 four warps leave ptxas of Triton 3.7 a register short on sm_120, and it spills.
    return Variant("fold_tokens", constants, 2, 1) if p.itemsize == 4 else Variant("fold_tokens", constants)


def token_variants(tokens: int, dim: int, heads: int, hidden: int, itemsize: int) -> dict[str, Variant]:
    """The kernels of the tokens' own steps: attention among `tokens`, and an MLP `hidden` wide."""
    product = {"C": dim, "BK": columns(dim, itemsize)}
    attend = {"H": heads, "D": dim // heads, "BN": tile(tokens, most=MAX_TOKENS), **product}
    mlp = {"HIDDEN": hidden, "BT": TOKEN_BLOCK, "BJ": min(hidden, 32 if itemsize == 4 else 64), **product}
    stages = 1 if itemsize == 4 else 2
    return {
        "attend": Variant("attend_tokens", attend, 8, stages),
        "mlp": Variant("mlp_tokens", mlp, 8, stages),
    }


def most_tokens(dim: int, itemsize: int) -> int:
    """Most tokens whose attention among themselves is one tile; more are left to plain torch.

    Wide tokens, and those of four bytes, fill registers and shared memory sooner: 32 of 256 columns would not
    fit a block of sm_120.
    """
    return MAX_TOKENS // max(1, dim // 128) ** 2 // max(1, itemsize // 2)


def launches(p: Problem, plan: ReadPlan | WritePlan) -> int:
    """Kernels that one call of the op starts: ours, and without folding the token or image projections.

    Prompt to image then projects queries, keys and values and adds two positions; image to prompt projects
    keys and values and adds one.
    """
    if isinstance(plan, ReadPlan):
        return len(read_variants(p, plan)) + (0 if plan.folded else 5)
    return len(write_variants(p, plan)) + (0 if plan.folded else 3)
