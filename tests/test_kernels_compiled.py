"""The kernels compiled ahead of time for GPUs that are not there: what each takes of registers and memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")

from benchmarks.kernel_cases import DTYPES, ITEMSIZE
from benchmarks.kernel_resources import SAM, SHIPPED, TARGETS, variants
from kernels.compiled import SHARED_LIMIT, compile_variant
from kernels.plan import (
    Problem,
    Variant,
    most_folded,
    plan_read,
    plan_write,
    read_variants,
    write_variants,
)

ALL_KERNELS = {
    "attend_tokens", "mlp_tokens", "fold_tokens", "read_folded", "read_heads", "merge", "write_folded",
    "write_heads",
}  # fmt: skip
# Widths and head_dims, each with a dtype and a target of its own: all of them would take minutes.
CLASSES = [
    (SAM, "fp32", 90),
    (SAM, "fp16", 120),
    (replace(SAM, heads=8, head_dim=32), "fp32", 80),
    (replace(SAM, heads=4, head_dim=64, tokens=64), "bf16", 90),
    (replace(SHIPPED, heads=4, head_dim=32, tokens=64), "fp32", 120),
    (replace(SHIPPED, dim=64, heads=1, head_dim=64, tokens=64), "bf16", 80),
    (replace(SHIPPED, dim=64, heads=2, head_dim=32), "fp16", 90),
]


def forms(problem: Problem) -> list[Variant]:
    """Each kernel that may run the problem, folding or not, once; merge and fold with a mask."""
    found = {v.kernel: v for _, v in variants((problem,))}
    for folded in (True, False):
        found |= {
            v.kernel + str(v.constants.get("HAS_VALUES", "")): v
            for v in read_variants(problem, plan_read(problem, folded=folded), mask=True).values()
        }
        if problem.tokens <= most_folded(problem.dim) or not folded:
            plan = plan_write(problem, folded=folded)
            made = write_variants(problem, plan, mask=True, after=True)
            found |= {v.kernel + str(v.constants.get("HAS_VALUES", "")): v for v in made.values()}
    found.pop("fold_tokens", None)  # there under the names of its two forms
    return list(found.values())


def check(variant: Variant, dtype: str, capability: int) -> None:
    found = compile_variant(variant, dtype, capability)
    assert found.target.startswith(f"sm_{capability}") and found.dtype == dtype, found
    assert found.stack == found.local == 0, (found, variant)
    assert 0 < found.shared <= SHARED_LIMIT[capability], (found, variant)
    # fp32 too: as products of TF32 numbers.
    assert 0 < found.registers <= 255 and found.tensor_core > 0, (found, variant)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_compile_without_spills_for(dtype: str, capability: int) -> None:
    made = forms(replace(SHIPPED, itemsize=ITEMSIZE[dtype]))
    assert {variant.kernel for variant in made} == ALL_KERNELS and len(made) == len(ALL_KERNELS) + 1
    for variant in made:
        check(variant, dtype, capability)


@pytest.mark.parametrize(("problem", "dtype", "capability"), CLASSES, ids=str)
def test_widths_and_head_dims_compile_without_spills(problem: Problem, dtype: str, capability: int) -> None:
    for variant in forms(replace(problem, itemsize=ITEMSIZE[dtype])):
        check(variant, dtype, capability)
