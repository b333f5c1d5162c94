"""The NVIDIA driver asked directly, through ctypes: is there a GPU, before any library for it is loaded."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

from ppcr.errors import EngineError

_LIBRARY = "libcuda.so.1"
_NO_DEVICE = 100
# CUdevice_attribute of the driver's interface.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """The first GPU that this process sees.

    Attributes:
        target: its compute capability as "sm_89". cuda: newest CUDA version of the driver, 12040 for 12.4.
    """

    target: str
    cuda: int


@cache
def first_gpu() -> Gpu:
    """The first GPU. Neither a context nor memory is made on it.

    Raises:
        EngineError: no driver, no GPU, or the driver does not work; a few words.
    """
    try:
        driver = ctypes.CDLL(_LIBRARY)
    except OSError:
        raise EngineError("no NVIDIA driver") from None
    started = driver.cuInit(0)
    if started not in (0, _NO_DEVICE):
        raise EngineError(f"the NVIDIA driver does not work (cuInit: error {started}): install it again")
    if started == _NO_DEVICE or _number(driver.cuDeviceGetCount) == 0:
        raise EngineError("no CUDA device (CUDA_VISIBLE_DEVICES may hide it)")
    major, minor = (_number(driver.cuDeviceGetAttribute, attribute, 0) for attribute in (_MAJOR, _MINOR))
    return Gpu(f"sm_{major}{minor}", _number(driver.cuDriverGetVersion))


def _number(function: ctypes._NamedFuncPointer, *arguments: int) -> int:
    out = ctypes.c_int(0)
    status = function(ctypes.byref(out), *arguments)
    if status:
        raise EngineError(f"the NVIDIA driver does not work (error {status}): install it again")
    return out.value
