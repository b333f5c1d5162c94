"""The CUDA runtime through cuda-python: devices, memory, streams, graphs; every failure one clear line."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ppcr.errors import EngineError

_INSTALL = "install it with: pip install '.[tensorrt]'"


@dataclass(frozen=True)
class Device:
    """One GPU: its number, name, compute capability as "sm_89", and memory in bytes (free, total)."""

    index: int
    name: str
    target: str
    free: int
    total: int


@cache
def bindings() -> Any:
    """``cuda.bindings.runtime``. Raises EngineError when cuda-python is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise EngineError(f"cuda-python cannot be used here ({error}): {_INSTALL}") from None
    return runtime


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime; its result, or a tuple of them, or None.

    Raises:
        EngineError: it failed; says what and, for the usual causes, what to do.
    """
    runtime = bindings()
    status, *results = getattr(runtime, name)(*arguments)
    if int(status) != 0:
        raise _error(runtime, name, status)
    if not results:
        return None
    return results[0] if len(results) == 1 else tuple(results)


def _error(runtime: Any, name: str, status: Any) -> EngineError:
    codes = runtime.cudaError_t
    if status == codes.cudaErrorInsufficientDriver:
        _, driver = runtime.cudaDriverGetVersion()
        _, needed = runtime.cudaRuntimeGetVersion()
        held = "there is no NVIDIA driver here" if not driver else f"the driver is for CUDA {_cuda(driver)}"
        return EngineError(f"{held}, CUDA {_cuda(needed)} is needed: install or update the NVIDIA driver")
    if status == codes.cudaErrorNoDevice:
        return EngineError("there is no GPU here (CUDA_VISIBLE_DEVICES may hide it)")
    if status == codes.cudaErrorMemoryAllocation:
        return EngineError("the GPU is out of memory: close other programs, or use a smaller precision")
    _, text = runtime.cudaGetErrorString(status)
    told = text.decode() if isinstance(text, bytes) else str(text)
    return EngineError(f"CUDA failed in {name}: {told}")


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def current_device() -> Device:
    """The GPU that this process uses.

    Raises:
        EngineError: no cuda-python, driver or GPU.
    """
    call("cudaGetDeviceCount")
    index = int(call("cudaGetDevice"))
    properties = call("cudaGetDeviceProperties", index)
    free, total = call("cudaMemGetInfo")
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Device(index, name, f"sm_{properties.major}{properties.minor}", int(free), int(total))


class DeviceMemory:
    """``size`` bytes on the GPU, zeros if ``zeroed``, freed with the object."""

    address = 0

    def __init__(self, size: int, *, zeroed: bool = False) -> None:
        # What made a thing destroys it: a destructor may run when there is nothing left to find it by.
        self.size, self._runtime = size, bindings()
        try:
            self.address = int(call("cudaMalloc", size))
        except EngineError as error:
            raise EngineError(f"{error} ({size / 1e6:.1f} MB were asked for)") from None
        if zeroed:
            call("cudaMemset", self.address, 0, size)
            # Streams that do not block each other do not wait for the default one either.
            call("cudaDeviceSynchronize")

    def __del__(self) -> None:
        if self.address:
            self._runtime.cudaFree(self.address)  # nobody is left to tell of a failure
            self.address = 0


class PinnedArray:
    """A numpy array in page-locked memory, which the GPU copies from and to without the processor.

    The memory lives as long as any view of ``array``.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        kind = np.dtype(dtype)
        count = int(np.prod(shape))
        self.address = int(call("cudaMallocHost", count * kind.itemsize))
        view = (ctypes.c_byte * (count * kind.itemsize)).from_address(self.address)
        weakref.finalize(view, bindings().cudaFreeHost, self.address)
        self.array: npt.NDArray[Any] = np.frombuffer(memoryview(view), kind, count).reshape(shape)
        self.array[...] = 0


class Stream:
    """A queue of work on the GPU."""

    def __init__(self) -> None:
        self._runtime = bindings()
        flags = self._runtime.cudaStreamNonBlocking
        self.handle = call("cudaStreamCreateWithFlags", flags)

    def __int__(self) -> int:
        return int(self.handle)

    def wait(self) -> None:
        """Wait on the host until everything queued is done."""
        call("cudaStreamSynchronize", self.handle)

    def upload(self, target: int, source: int, size: int) -> None:
        """Queue a copy of ``size`` bytes from page-locked host memory."""
        self._copy(target, source, size, "cudaMemcpyHostToDevice")

    def download(self, target: int, source: int, size: int) -> None:
        """Queue a copy of ``size`` bytes to page-locked host memory."""
        self._copy(target, source, size, "cudaMemcpyDeviceToHost")

    def move(self, target: int, source: int, size: int) -> None:
        """Queue a copy of ``size`` bytes within the GPU."""
        self._copy(target, source, size, "cudaMemcpyDeviceToDevice")

    def move_rows(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int
    ) -> None:
        """Queue a copy of ``rows`` rows of ``width`` bytes within the GPU; pitches are from row to row."""
        kind = bindings().cudaMemcpyKind.cudaMemcpyDeviceToDevice
        call("cudaMemcpy2DAsync", target, target_pitch, source, source_pitch, width, rows, kind, self.handle)

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        call("cudaMemcpyAsync", target, source, size, getattr(bindings().cudaMemcpyKind, kind), self.handle)

    def record(self) -> Event:
        """A mark behind everything queued so far."""
        event = Event()
        call("cudaEventRecord", event.handle, self.handle)
        return event

    def after(self, event: Event) -> None:
        """Have everything queued from now on wait for ``event`` of another stream."""
        call("cudaStreamWaitEvent", self.handle, event.handle, 0)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what ``work`` queues on this stream, without running it."""
        mode = bindings().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", self.handle, mode)
        try:
            work()
        except BaseException:
            # Ends the capture; the graph it leaves is invalid, and the first error is the one to tell.
            bindings().cudaStreamEndCapture(self.handle)
            raise
        return Graph(call("cudaStreamEndCapture", self.handle))

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._runtime.cudaStreamDestroy(self.handle)


class Event:
    """A mark in a stream that another may wait for."""

    def __init__(self) -> None:
        self._runtime = bindings()
        self.handle = call("cudaEventCreateWithFlags", self._runtime.cudaEventDisableTiming)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._runtime.cudaEventDestroy(self.handle)


class Graph:
    """A recorded sequence of work, launched at once."""

    def __init__(self, graph: Any) -> None:
        self._graph, self._runtime = graph, bindings()
        self._ready = call("cudaGraphInstantiate", graph, 0)

    def launch(self, stream: Stream) -> None:
        call("cudaGraphLaunch", self._ready, stream.handle)

    def __del__(self) -> None:
        if hasattr(self, "_ready"):
            self._runtime.cudaGraphExecDestroy(self._ready)
            self._runtime.cudaGraphDestroy(self._graph)
