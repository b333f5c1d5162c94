"""Record the signatures of the bindings that the runtime calls: ``python -m tests.record_signatures``.

The tables let the tests check every call where neither cuda-python nor TensorRT is installed; where they are,
a test compares the tables with them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import re
from pathlib import Path
from typing import Any

from export.model_optimizer import FORMATS

FOLDER = Path(__file__).parent / "signatures"
CUDA = (
    "cudaGetDeviceCount", "cudaGetDevice", "cudaGetDeviceProperties", "cudaMemGetInfo",
    "cudaDriverGetVersion",
    "cudaRuntimeGetVersion", "cudaGetErrorString", "cudaDeviceSynchronize", "cudaMalloc", "cudaFree",
    "cudaMallocHost", "cudaFreeHost", "cudaMemset", "cudaMemcpyAsync", "cudaMemcpy2DAsync",
    "cudaStreamCreateWithFlags", "cudaStreamDestroy", "cudaStreamSynchronize", "cudaStreamWaitEvent",
    "cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaEventCreateWithFlags", "cudaEventRecord",
    "cudaEventDestroy", "cudaGraphInstantiate", "cudaGraphLaunch", "cudaGraphDestroy", "cudaGraphExecDestroy",
)  # fmt: skip
CUDA_VALUES = {
    "cudaError_t": (
        "cudaSuccess",
        "cudaErrorMemoryAllocation",
        "cudaErrorInsufficientDriver",
        "cudaErrorNoDevice",
    ),
    "cudaMemcpyKind": ("cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice"),
    "cudaStreamCaptureMode": ("cudaStreamCaptureModeThreadLocal",),
}
CUDA_FLAGS = ("cudaStreamNonBlocking", "cudaEventDisableTiming")
TENSORRT = {
    "Runtime": ("deserialize_cuda_engine", "get_engine_validity"),
    "ICudaEngine": (
        "create_execution_context", "create_runtime_config", "get_tensor_dtype", "get_tensor_name",
        "get_tensor_profile_shape", "get_tensor_shape", "get_weight_streaming_automatic_budget",
    ),
    "IExecutionContext": (
        "execute_async_v3", "set_input_shape", "set_optimization_profile_async", "set_tensor_address",
    ),
    "IRuntimeConfig": ("create_runtime_cache", "set_runtime_cache"),
    "IRuntimeCache": ("deserialize", "serialize"),
}  # fmt: skip


def cuda() -> dict[str, Any]:
    """Parameters of each function, values of each enumeration and flag, of the installed cuda-python."""
    runtime = importlib.import_module("cuda.bindings.runtime")
    enumerations = {
        name: {member: int(getattr(getattr(runtime, name), member)) for member in members}
        for name, members in CUDA_VALUES.items()
    }
    return {
        "release": f"cuda-bindings {importlib.import_module('cuda.bindings').__version__}",
        "functions": {name: parameters(getattr(runtime, name).__doc__)[0] for name in CUDA},
        "enumerations": enumerations,
        "flags": {name: int(getattr(runtime, name)) for name in CUDA_FLAGS},
    }


def tensorrt(module: Any) -> dict[str, Any]:
    """Parameters of each method, one list for each overload, of an installed library."""
    return {
        "release": f"{module.__name__} {module.__version__}",
        "methods": {
            f"{kind}.{name}": parameters(getattr(getattr(module, kind), name).__doc__, name)
            for kind, names in TENSORRT.items()
            for name in names
        },
    }


def model_optimizer() -> dict[str, Any]:
    """Parameters of ModelOpt's two functions, and the recipes, as JSON holds them, of the installed one."""
    quantizer = importlib.import_module("modelopt.torch.quantization")
    writer = importlib.import_module("modelopt.torch.export")
    functions = {"quantize": quantizer.quantize, "export_hf_checkpoint": writer.export_hf_checkpoint}
    return {
        "release": f"nvidia-modelopt {importlib.metadata.version('nvidia-modelopt')}",
        "parameters": {
            name: [p.name for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]
            for name, function in functions.items()
        },
        "recipes": {name: plain(getattr(quantizer, name)) for name in FORMATS.values()},
    }


def plain(value: Any) -> Any:
    """Nested dictionaries with names for keys, and lists: what a round through JSON keeps."""
    return json.loads(json.dumps(value, default=dict))


def parameters(text: str, name: str = r"\w+") -> list[list[str]]:
    """Names of the parameters in a binding's docstring, for each overload; "=" marks those with a default."""
    found = []
    for line in text.strip().splitlines():
        match = re.match(rf"(?:\d+\. )?{name}\((?P<inside>.*)\)(?: ->.*)?$", line.strip())
        if match and match["inside"] != "*args, **kwargs":
            parts = [
                part.strip() for part in re.split(r",(?![^\[<(]*[\]>)])", match["inside"]) if part.strip()
            ]
            names = [bare(part) for part in parts]
            found.append([part for part in names if part != "self"])
    return found


def bare(part: str) -> str:
    name = part.partition(":")[0].partition("=")[0].split()[-1]
    return f"{name}=" if "=" in part else name


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    tables = {
        "cuda_python": cuda,
        "tensorrt_rtx": lambda: tensorrt(importlib.import_module("tensorrt_rtx")),
        "model_optimizer": model_optimizer,
    }
    for name, record in tables.items():
        try:
            table = record()
        except ModuleNotFoundError as error:
            print(f"{name} is not recorded: {error}")
            continue
        (FOLDER / f"{name}.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
