"""The sizes the kernels are judged at, and what they take compiled ahead of time for each target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.kernel_cases import ITEMSIZE
from kernels.plan import (
    Problem,
    Variant,
    most_tokens,
    plan_read,
    plan_write,
    read_variants,
    token_variants,
    write_variants,
)
from ppcr.model.segmenter import SegmenterConfig

TARGETS = (80, 90, 120)
COMPILED = ("fp16", "bf16", "fp32")
SHIPPED = Problem(1, 1, True, 13, 1024, 128, 4, 16, 2)
SAM = Problem(1, 1, True, 13, 4096, 256, 8, 16, 2)
SAM_LONG = Problem(1, 1, True, 133, 4096, 256, 8, 16, 2)


def resources(targets: Sequence[int]) -> list[dict[str, Any]]:
    """Resources of each kernel at the shipped sizes and SAM's, in each dtype, for each target."""
    from kernels.compiled import compile_variant

    return [
        {"dim": dim, "capability": capability, **compile_variant(variant, dtype, capability).to_json()}
        for dtype in COMPILED
        for capability in targets
        for dim, variant in variants(
            [replace(problem, itemsize=ITEMSIZE[dtype]) for problem in (SHIPPED, SAM, SAM_LONG)]
        )
    ]


def variants(problems: Sequence[Problem], *, masks: Sequence[bool] = (True,)) -> list[tuple[int, Variant]]:
    """Each compiled form that runs ``problems``, once, with the width it is for."""
    found: dict[object, tuple[int, Variant]] = {}
    for p in problems:
        tokens = min(p.tokens, most_tokens(p.dim, p.itemsize))
        here = list(token_variants(tokens, p.dim, p.heads, SegmenterConfig().mlp, p.itemsize).values())
        for mask in masks:
            here += read_variants(p, plan_read(p), mask=mask).values()
            here += write_variants(p, plan_write(p), mask=mask, after=True).values()
        found |= {(v.kernel, tuple(sorted(v.constants.items())), v.warps): (p.dim, v) for v in here}
    return list(found.values())


def compiled(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By target: kernels, bytes spilled, most shared memory and registers, fewest matrix instructions."""
    found = {}
    for capability in sorted({row["capability"] for row in rows}):
        here = [row for row in rows if row["capability"] == capability]
        found[f"sm_{capability}"] = {
            "kernels": len(here),
            "spilled": sum(row["stack"] + row["local"] for row in here),
            "shared": max(row["shared"] for row in here),
            "registers": max(row["registers"] for row in here),
            "tensor_core": min(row["tensor_core"] for row in here),
        }
    return found


def resource_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The resources as text."""
    names = "kernel", "dim", "dtype", "target", "registers", "stack", "shared", "tensor_core"
    lines = ["  " + "".join(f"{name:>14}" for name in names)]
    return lines + ["  " + "".join(f"{row[name]:>14}" for name in names) for row in rows]
