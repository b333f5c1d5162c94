"""What a figure was measured on: hardware and versions, without anything that names the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from ppcr import __version__

LIBRARIES = (
    "numpy", "Pillow", "cykooz-resizer", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "torchvision",
    "transformers", "triton", "tensorrt", "tensorrt-rtx", "tensorrt-llm",
)  # fmt: skip
_MIB = 1 << 20


def describe() -> dict[str, str | int | float]:
    """Processor, usable cores, memory, load, system, and the version of every library that takes part."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _MIB,
        # Whatever else ran at the time slows every row; a reader should see it.
        "load_1min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}",
        **gpu(),
        "python": platform.python_version(),
        "ppcr": __version__,
        **versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def gpu() -> dict[str, str]:
    """Name, memory and driver of the first GPU, as its driver's own tool tells them; nothing without one."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, text=True, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    first = told.stdout.splitlines()[:1] if told.returncode == 0 else []
    return {"gpu": first[0].strip()} if first else {}


def is_busy(interval: float = 0.5, share: float = 0.25, stat: Path = Path("/proc/stat")) -> bool:
    """Whether other work takes more than ``share`` of the processors while this process sleeps."""
    before = _busy_and_all(stat)
    time.sleep(interval)
    busy, whole = (after - then for after, then in zip(_busy_and_all(stat), before, strict=True))
    return busy > share * whole


def _busy_and_all(stat: Path) -> tuple[int, int]:
    times = [int(word) for word in stat.read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
    idle = times[3] + times[4]  # idle, and waiting for the disk
    return sum(times) - idle, sum(times)


def versions() -> dict[str, str]:
    """Name -> version of the libraries that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name as Linux gives it, else its architecture."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def peak_gpu_memory_mb() -> float | None:
    """Most memory that torch ever held of the GPU in this process, in MiB; None where it holds none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return float(torch.cuda.max_memory_reserved()) / _MIB


def peak_memory_mb(status: Path = Path("/proc/self/status")) -> float:
    """Most memory this process ever held, in MiB.

    Of this program alone: ``getrusage`` would count the larger process that it was forked from.
    """
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"{status} holds no VmHWM line")
