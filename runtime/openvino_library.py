"""OpenVINO itself: reading and compiling graphs, and running them from several threads."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as operators
from openvino.frontend.onnx import ConversionExtension

from ppcr.errors import BundleError
from ppcr.manifest import REBUILD

# What the other files use of OpenVINO goes through this one.
__all__ = [
    "Compiled", "ConversionExtension", "Core", "Graph", "Model", "Orders", "Tensor", "compile_model",
    "float32", "has_bf16", "is_float32", "make_model", "operators", "read",
]  # fmt: skip

Compiled: TypeAlias = ov.CompiledModel
Core: TypeAlias = ov.Core
Model: TypeAlias = ov.Model
Tensor: TypeAlias = ov.Tensor
Shapes: TypeAlias = Mapping[str, Sequence[int]]
_Key = TypeVar("_Key", bound=Hashable)
_Made = TypeVar("_Made")

float32 = ov.Type.f32
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def has_bf16(core: ov.Core) -> bool:
    """Whether the processor has instructions for products in bfloat16."""
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def read(core: ov.Core, path: Path) -> ov.Model:
    """The graph in ``path``. Raises BundleError: OpenVINO cannot read it."""
    try:
        return core.read_model(str(path))
    except RuntimeError as error:
        raise _refused(path, error) from error


def compile_model(
    core: ov.Core,
    model: ov.Model,
    path: Path,
    threads: int,
    *,
    bf16: bool = False,
    shapes: Shapes | None = None,
) -> ov.CompiledModel:
    """``model``, which was read from ``path``, for ``threads`` threads of the CPU.

    Args:
        bf16: products are computed in bfloat16, else in float32.
        shapes: of each input by name. A graph without open shapes is up to a third faster: layouts are chosen
            and memory is laid out once.

    Raises:
        BundleError: OpenVINO cannot compile it, or cannot have these shapes.
    """
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        # OpenVINO takes bf16 by itself where it can: say f32 as well.
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        # Encoder and MLLM run side by side: pinned, both might be given the same processor.
        "ENABLE_CPU_PINNING": False,
        # Nor may it quantise activations where weights are int8, as it does by itself.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    try:
        if shapes is not None:
            model = model.clone()
            model.reshape({name: list(shape) for name, shape in shapes.items()})
        return core.compile_model(model, "CPU", settings)
    except RuntimeError as error:
        raise _refused(path, error) from error
    finally:
        _give_back()


def _give_back() -> None:
    """Have the C library give back what compilers have freed: glibc keeps it for each thread by itself."""
    if _malloc_trim is not None:
        _malloc_trim(0)


def make_model(outputs: Sequence[Any], inputs: Sequence[Any]) -> ov.Model:
    """The graph between ``inputs`` and ``outputs``, nodes both."""
    return ov.Model(outputs, inputs, "part")


def is_float32(node: Any) -> bool:
    """Whether the first output of a graph's node is float32."""
    return bool(node.get_element_type() == float32)


def _refused(path: Path, error: RuntimeError) -> BundleError:
    told = str(error).strip().splitlines()
    reason = told[-1] if told else type(error).__name__
    return BundleError(f"OpenVINO {ov.__version__} cannot read {path}: {reason}; {REBUILD}")


class Graph:
    """A compiled graph. Threads may share it: each run has a request of its own.

    Requests are used again: making one takes as long as running a small graph.
    """

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._compiled = compiled
        self._idle = [compiled.create_infer_request()]
        self.inputs = frozenset(given.any_name for given in compiled.inputs)

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[np.float32]]:
        """All outputs by name, in memory of their own."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        for name, array in feeds.items():
            request.set_tensor(name, ov.Tensor(np.ascontiguousarray(array), shared_memory=True))
        request.infer()
        found = {output.any_name: request.get_tensor(output).data.copy() for output in self._compiled.outputs}
        self._idle.append(request)
        return found


class Orders(Generic[_Key, _Made]):
    """What takes long to make, made once for each key, in the background. Threads may share it.

    Args:
        make: the thing for a key. What it raises is raised for those who wait for it.
    """

    def __init__(self, make: Callable[[_Key], _Made]) -> None:
        self._make = make
        self._ordered: dict[_Key, Future[_Made]] = {}
        self._lock = threading.Lock()
        self._maker = ThreadPoolExecutor(1, "ppcr-compiler")

    def __len__(self) -> int:
        return len(self._ordered)

    def is_ready(self, key: _Key) -> bool:
        """Whether the thing for ``key`` is there."""
        known = self._ordered.get(key)
        return known is not None and known.done() and known.exception() is None

    def order(self, key: _Key) -> Future[_Made]:
        """The thing for ``key``, which may not be there yet."""
        with self._lock:
            known = self._ordered.get(key)
            # What failed in the background, for want of memory perhaps, is tried again for one who waits.
            if known is None or (known.done() and known.exception() is not None):
                known = self._ordered[key] = self._maker.submit(self._make, key)
            return known
