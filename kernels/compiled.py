"""Compiles the kernels ahead of time, for GPUs that need not be there, and reads back what they take.

Triton brings its own assembler and `cuobjdump`; neither a GPU nor a CUDA toolkit is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.library import KERNELS
from kernels.plan import Variant

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""Compute capability -> most shared memory of a block in bytes (CUDA programming guide, table of limits)."""

_FLOATS = {"p_part", "p_lse", "p_bias"}
_SCALARS = {"scale": "fp32", "eps": "fp32"}
_MULTIPLES = {"M", "position_stride"}  # of 16 for every grid of cells: loads of them are then vectors


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    Attributes:
        target: such as ``sm_90a``, from the assembly itself.
        registers: of a thread; stack, local: bytes of a thread in memory, that is spilled registers.
        shared: bytes of a block.
        tensor_core: matrix instructions in the code (wgmma on 90, mma elsewhere and for small tiles).
    """

    kernel: str
    target: str
    dtype: str
    registers: int
    stack: int
    local: int
    shared: int
    tensor_core: int

    def to_json(self) -> dict[str, str | int]:
        return asdict(self)


@dataclass(frozen=True)
class CompiledKernel:
    """Machine code (cubin) and assembly (PTX) of a variant, the entry's name, and bytes of shared memory."""

    binary: bytes
    assembly: str
    entry: str
    shared: int

    @property
    def parameters(self) -> int:
        """How many the entry takes: the kernel's own, then Triton's."""
        head = re.search(r"\.entry\s+\w+\((.*?)\)", self.assembly, re.DOTALL)
        return head.group(1).count(".param") if head else 0


def compile_variant(variant: Variant, dtype: str, capability: int) -> Resources:
    """What `compile_kernel` makes takes."""
    built = compile_kernel(variant, dtype, capability)
    registers, stack, local = _usage(built.binary)
    target = re.search(r"^\.target\s+(\w+)", built.assembly, re.MULTILINE)
    return Resources(
        kernel=variant.kernel,
        target=target.group(1) if target else "",
        dtype=dtype,
        registers=registers,
        stack=stack,
        local=local,
        shared=built.shared,
        tensor_core=len(re.findall(r"\b(?:wgmma\.mma_async|mma)\.sync", built.assembly)),
    )


def compile_kernel(
    variant: Variant, dtype: str, capability: int, fixed: Mapping[str, float | None] | None = None
) -> CompiledKernel:
    """Compile for a compute capability (80, 89, 90, 120) with tensors of ``dtype`` (fp16, bf16, fp32).

    Tensors begin at multiples of 16 bytes, and the number of cells is one of 16. ``fixed`` holds arguments
    that are constants of the code, by name.
    """
    kernel = KERNELS[variant.kernel]
    constants: dict[str, Any] = dict(variant.constants) | dict(fixed or {})
    if not constants.get("HAS_MASK", True):
        constants["p_mask"] = None
    if not constants.get("HAS_AFTER", True):
        constants["p_after"] = None
    if not constants.get("HAS_VALUES", True):
        constants |= dict.fromkeys(("p_b2", "p_wv", "p_bv", "p_wo", "p_bias", "p_value"))
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else _type(name, dtype) for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if name not in constants and (name.startswith("p_") or name in _MULTIPLES)
        },
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return CompiledKernel(built.asm["cubin"], built.asm["ptx"], built.metadata.name, built.metadata.shared)


def _type(name: str, dtype: str) -> str:
    if not name.startswith("p_"):
        return _SCALARS.get(name, "i32")
    return "*u8" if name == "p_mask" else "*fp32" if name in _FLOATS else f"*{dtype}"


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack and local bytes, as the assembler recorded them in the binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory(prefix="ppcr-kernel-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        told = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told.stdout + told.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump told no resources: {(told.stdout + told.stderr).strip()[:200]}")
    registers, stack, local = map(int, found.groups())
    return registers, stack, local
