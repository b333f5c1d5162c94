"""A GPU that is not there: cuda-python as the session sees it, every call checked and kept.

The signatures are those of the real bindings (`tests.record_signatures`): a call with other arguments fails.
Memory is real, copies are made, and each must lie within what was allocated. What is queued runs at once: the
fake knows no race between streams.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.recorded import table


class FakeCuda:
    """``cuda.bindings.runtime`` of a GPU of compute capability 8.9.

    Attributes:
        calls: names of the functions called, with their arguments.
        failing: function name -> the error it returns from now on.
        live: bytes at each address that is allocated now.
    """

    def __init__(self) -> None:
        recorded = table("cuda_python")
        self._functions: dict[str, list[str]] = recorded["functions"]
        for name, members in recorded["enumerations"].items():
            setattr(self, name, IntEnum(name, members))
        for name, value in recorded["flags"].items():
            setattr(self, name, value)
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.failing: dict[str, str] = {}
        self.live: dict[int, Any] = {}
        self.pinned: set[int] = set()
        self.free_memory = 1 << 34
        self._handles = 0
        self.objects: dict[int, Any] = {}
        self._capturing: tuple[int, list[Callable[[], None]]] | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in self.__dict__.get("_functions", {}):
            raise AttributeError(f"cuda-python has no {name}, or it is not in the table of signatures")

        def called(*arguments: Any) -> Any:
            assert len(arguments) == len(self._functions[name]), f"{name}{arguments}: {self._functions[name]}"
            self.calls.append((name, arguments))
            errors: Any = self.__dict__["cudaError_t"]
            if name in self.failing:
                return errors[self.failing[name]], *(
                    [None] if name.startswith(("cudaGet", "cudaMalloc")) else []
                )
            do = getattr(type(self), f"_{name}")
            results = do(self, *arguments)
            return errors.cudaSuccess, *(
                results if isinstance(results, tuple) else [results] if results is not None else []
            )

        return called

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def queue(self, stream: int, work: Callable[[], None]) -> None:
        """Run ``work`` now, or note it where ``stream`` is being captured."""
        self.use(stream, "stream")
        if self._capturing is not None and self._capturing[0] == int(stream):
            self._capturing[1].append(work)
        else:
            work()

    def within(self, address: int, size: int) -> None:
        """Fail unless these bytes lie within one allocation."""
        assert any(
            start <= address and address + size <= start + len(memory) for start, memory in self.live.items()
        ), f"{size} bytes at {address} are not allocated"

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.within(address, size)
        return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype).reshape(shape)

    def make(self, kind: str, value: Any = None) -> int:
        self._handles += 1
        self.objects[self._handles] = kind, value
        return self._handles

    def use(self, handle: int, kind: str) -> Any:
        held, value = self.objects[int(handle)]
        assert held == kind
        return value

    def _cudaGetDeviceCount(self) -> int:
        return 1

    def _cudaGetDevice(self) -> int:
        return 0

    def _cudaGetDeviceProperties(self, device: int) -> Any:
        return SimpleNamespace(name=b"Fake GPU", major=8, minor=9)

    def _cudaMemGetInfo(self) -> tuple[int, int]:
        return self.free_memory, 1 << 34

    def _cudaDriverGetVersion(self) -> int:
        return 12040

    def _cudaRuntimeGetVersion(self) -> int:
        return 13050

    def _cudaGetErrorString(self, error: Any) -> bytes:
        return f"text of {error.name}".encode()

    def _cudaDeviceSynchronize(self) -> None:
        return None

    def _cudaMalloc(self, size: int) -> int:
        assert size > 0
        # TensorRT wants tensors at multiples of 256 bytes, as cudaMalloc gives them.
        memory = (ctypes.c_byte * (size + 256))()
        address = -(-ctypes.addressof(memory) // 256) * 256
        ctypes.memset(address, 0xFF, size)  # NaN as a float of any width: nothing may rely on fresh memory
        self.live[address] = (ctypes.c_byte * size).from_address(address)
        self.objects[address] = "memory", memory
        return address

    def _cudaFree(self, address: int) -> None:
        del self.live[address], self.objects[address]

    def _cudaMallocHost(self, size: int) -> int:
        address = self._cudaMalloc(size)
        self.pinned.add(address)
        return address

    def _cudaFreeHost(self, address: int) -> None:
        self.pinned.remove(address)
        self._cudaFree(address)

    def _cudaMemset(self, address: int, value: int, size: int) -> None:
        self.within(address, size)
        ctypes.memset(address, value, size)

    def _cudaMemcpyAsync(self, target: int, source: int, size: int, kind: Any, stream: int) -> None:
        self._cudaMemcpy2DAsync(target, size, source, size, size, 1, kind, stream)

    def _cudaMemcpy2DAsync(
        self,
        target: int,
        tpitch: int,
        source: int,
        spitch: int,
        width: int,
        height: int,
        kind: Any,
        stream: int,
    ) -> None:
        host = {"cudaMemcpyHostToDevice": source, "cudaMemcpyDeviceToHost": target}.get(kind.name)
        if host is not None:
            assert any(p <= host < p + len(self.live[p]) for p in self.pinned), "not page-locked"

        def copy() -> None:
            for row in range(height):
                self.within(target + row * tpitch, width)
                self.within(source + row * spitch, width)
                ctypes.memmove(target + row * tpitch, source + row * spitch, width)

        self.queue(stream, copy)

    def _cudaStreamCreateWithFlags(self, flags: int) -> int:
        return self.make("stream")

    def _cudaStreamDestroy(self, stream: int) -> None:
        del self.objects[int(stream)]

    def _cudaStreamSynchronize(self, stream: int) -> None:
        assert self._capturing is None, "a capture may not be waited for"
        self.use(stream, "stream")

    def _cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        self.use(stream, "stream"), self.use(event, "event")

    def _cudaStreamBeginCapture(self, stream: int, mode: Any) -> None:
        self._capturing = int(stream), []

    def _cudaStreamEndCapture(self, stream: int) -> int:
        assert self._capturing is not None and self._capturing[0] == int(stream)
        work, self._capturing = self._capturing[1], None
        return self.make("graph", work)

    def _cudaEventCreateWithFlags(self, flags: int) -> int:
        return self.make("event")

    def _cudaEventRecord(self, event: int, stream: int) -> None:
        self.use(event, "event"), self.use(stream, "stream")

    def _cudaEventDestroy(self, event: int) -> None:
        del self.objects[int(event)]

    def _cudaGraphInstantiate(self, graph: int, flags: int) -> int:
        return self.make("ready", self.use(graph, "graph"))

    def _cudaGraphLaunch(self, ready: int, stream: int) -> None:
        for work in self.use(ready, "ready"):
            self.queue(stream, work)

    def _cudaGraphDestroy(self, graph: int) -> None:
        del self.objects[int(graph)]

    def _cudaGraphExecDestroy(self, ready: int) -> None:
        del self.objects[int(ready)]
