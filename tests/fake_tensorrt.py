"""TensorRT on a GPU that is not there (`tests.fake_cuda`): engines that onnxruntime computes.

An engine file holds the typed ONNX graph that TensorRT would have compiled, and a run computes it with
onnxruntime from the bound addresses; so buffers, offsets, the in-place cache and the graph are held to right
answers, not to call lists alone. Methods take what the recorded overloads of the real bindings take.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

from tests.fake_cuda import FakeCuda
from tests.recorded import table

_KINDS = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bool)": np.bool_,
    "tensor(int64)": np.int64,
}


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
    streamable_weights_size = 0

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
