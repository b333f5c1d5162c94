"""What this machine's processor can do, as far as it decides which engine and precision is taken."""

from __future__ import annotations

from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_BF16 = frozenset({"avx512_bf16", "amx_bf16"})


def has_bf16() -> bool:
    """Whether it has instructions for products in bfloat16 that OpenVINO uses; False where nobody tells."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return bool(_BF16 & set(flags.split()))
