"""A GPU that is not there: cuda-python and TensorRT as the session sees them, every call checked and kept.

The signatures are those of the real bindings (`tests.record_signatures`): a call with other arguments fails.
Memory is real, copies are made, and each must lie within what was allocated. An engine file holds the typed
ONNX graph that TensorRT would have compiled, and a run computes it with onnxruntime from the bound addresses;
so buffers, offsets, the in-place cache and the graph are held to right answers, not to call lists alone.
What is queued runs at once: the fake knows no race between streams.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

TABLES = Path(__file__).parent / "signatures"
_KINDS = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bool)": np.bool_,
    "tensor(int64)": np.int64,
}


def table(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((TABLES / f"{name}.json").read_text())
    return loaded


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


def checked(kind: str) -> Callable[[type], type]:
    """Have the public methods of a class take only what the recorded overloads of ``kind`` take."""
    methods: dict[str, list[list[str]]] = table("tensorrt_rtx")["methods"]

    def wrap(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def called(self: Any, *arguments: Any) -> Any:
            counts = {
                n
                for overload in methods[f"{kind}.{name}"]
                for n in range(sum(not p.endswith("=") for p in overload), len(overload) + 1)
            }
            assert len(arguments) in counts, f"{kind}.{name} does not take {len(arguments)} arguments"
            return method(self, *arguments)

        return called

    def dress(made: type) -> type:
        for name, method in list(vars(made).items()):
            if not name.startswith("_") and callable(method):
                setattr(made, name, wrap(name, method))
        return made

    return dress


def engine_file(model: bytes, profiles: tuple[dict[str, tuple[int, int, int]], ...]) -> bytes:
    """What a fake engine is loaded from."""
    return json.dumps(profiles).encode() + b"\n" + model


class FakeTensorRT:
    """The module ``tensorrt_rtx`` over a `FakeCuda`.

    Attributes:
        bound: (tensor, address) of every set_tensor_address; runs: streams of every run.
        refusing: bits of EngineInvalidityDiagnostics that every engine is refused with.
    """

    __version__ = "1.7.1.116"

    class EngineValidity(IntEnum):
        VALID, SUBOPTIMAL, INVALID = 0, 1, 2

    class EngineInvalidityDiagnostics(IntEnum):
        VERSION_MISMATCH, UNSUPPORTED_CC, OLD_CUDA_DRIVER, MALFORMED_ENGINE = 1, 2, 4, 32

    class CudaGraphStrategy(IntEnum):
        DISABLED, WHOLE_GRAPH_CAPTURE = 0, 1

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.bound: list[tuple[str, int]] = []
        self.runs: list[int] = []
        self.refusing, self.unloadable = 0, False
        self.Logger: Any = type("Logger", (), {"ERROR": 1, "__init__": lambda self, severity: None})

    def Runtime(self, logger: Any) -> Any:
        return _Runtime(self)


@checked("Runtime")
class _Runtime:
    engine_header_size = 64

    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt

    def get_engine_validity(self, header: bytes) -> Any:
        assert len(header) == self.engine_header_size
        validity = self._trt.EngineValidity
        return (validity.INVALID if self._trt.refusing else validity.VALID), self._trt.refusing

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        return None if self._trt.unloadable else _Engine(self._trt, data)


@checked("ICudaEngine")
class _Engine:
    def __init__(self, trt: FakeTensorRT, data: bytes) -> None:
        self._trt = trt
        head, _, model = data.partition(b"\n")
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self._profiles = json.loads(head)
        self._model = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._inputs = {value.name: value for value in self._model.get_inputs()}
        self._tensors = {**self._inputs, **{value.name: value for value in self._model.get_outputs()}}
        self.num_io_tensors = len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size if isinstance(size, int) else -1 for size in self._tensors[name].shape]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(itemsize=np.dtype(_KINDS[self._tensors[name].type]).itemsize)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        ranges = self._profiles[profile] if self._profiles else {}
        sizes = self._inputs[name].shape
        return [[s if isinstance(s, int) else ranges[s][k] for s in sizes] for k in range(3)]

    def create_runtime_config(self) -> Any:
        return _RuntimeConfig()

    def create_execution_context(self, config: Any) -> Any:
        assert isinstance(config, _RuntimeConfig)
        return _Context(self)


@checked("IRuntimeConfig")
class _RuntimeConfig:
    cuda_graph_strategy = None

    def create_runtime_cache(self) -> Any:
        return _Kernels()

    def set_runtime_cache(self, cache: Any) -> bool:
        return isinstance(cache, _Kernels)


@checked("IRuntimeCache")
class _Kernels:
    def serialize(self) -> bytes:
        return b"finished kernels"

    def deserialize(self, blob: bytes) -> bool:
        return blob == b"finished kernels"


@checked("IExecutionContext")
class _Context:
    def __init__(self, engine: Any) -> None:
        self._engine, self._trt, self._profile = engine, engine._trt, 0
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._trt.cuda.use(stream, "stream")
        self._profile = profile
        return profile < len(self._engine._profiles)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._trt.bound.append((name, address))
        self._addresses[name] = address
        return name in self._engine._tensors and address % 256 == 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        self._shapes[name] = tuple(shape)
        return len(shape) == len(most) and all(
            a <= size <= b for a, size, b in zip(least, shape, most, strict=True)
        )

    def execute_async_v3(self, stream: int) -> bool:
        engine, cuda = self._engine, self._trt.cuda
        addresses, shapes = dict(self._addresses), dict(self._shapes)
        if set(addresses) != set(engine._tensors):
            return False

        def run() -> None:
            feed = {}
            for name, value in engine._inputs.items():
                shape = shapes.get(name) or tuple(value.shape)
                feed[name] = cuda.array(addresses[name], shape, _KINDS[value.type]).copy()
            for name, result in zip(
                [value.name for value in engine._model.get_outputs()],
                engine._model.run(None, feed),
                strict=True,
            ):
                cuda.array(addresses[name], result.shape, result.dtype)[...] = result

        self._trt.runs.append(int(stream))
        cuda.queue(stream, run)
        return True
