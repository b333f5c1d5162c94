"""Where torch computes, how much room there is, and what its errors mean to a user: one clear line each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from ppcr.errors import EngineError
from runtime.cuda_driver import first_gpu

_P = ParamSpec("_P")
_R = TypeVar("_R")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SMALLER = {"fp32": "--precision bf16", "fp16": "--engine onnxruntime", "bf16": "--engine onnxruntime"}


def choose_device(wanted: str | None = None) -> torch.device:
    """The device called ``wanted``; by default the GPU where there is one, else the CPU.

    Raises:
        EngineError: no driver, or one that is too old; or this torch is built without CUDA.
    """
    if wanted is None:
        try:
            first_gpu()
        except EngineError:
            return torch.device("cpu")
    device = torch.device(wanted or "cuda")
    if device.type != "cuda":
        return device
    if not torch.backends.cuda.is_built():
        raise EngineError(f"torch {torch.__version__} is built without CUDA: install a build with it")
    try:
        torch.cuda.init()
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # no driver, an old one, or kernels for other GPUs
        raise EngineError(f"torch {torch.__version__} cannot use the GPU: {_first_line(error)}") from error
    return device


def require_room(needed: int, precision: str, device: torch.device) -> None:
    """Raise EngineError unless ``needed`` bytes are free on a GPU."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if needed > free:
        raise EngineError(
            f"this bundle needs about {needed / 1e6:.0f} MB on the GPU at {precision}, {free / 1e6:.0f} of "
            f"{total / 1e6:.0f} MB are free: close other programs, or use {_SMALLER[precision]}"
        )


def at_work(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function`` without gradients; running out of memory in it is an EngineError."""

    @functools.wraps(function)
    def working(*arguments: _P.args, **named: _P.kwargs) -> _R:
        try:
            with torch.no_grad():
                return function(*arguments, **named)
        except torch.OutOfMemoryError as error:
            # torch says how much it tried to get, and how much is free, in its first sentences.
            told = ". ".join(_first_line(error).split(". ")[:2]).removesuffix(".")
            raise EngineError(f"{told}: close other programs, or use a smaller precision") from error

    return working


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
