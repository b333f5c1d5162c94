"""What is called of cuda-python and TensorRT is what the recorded tables and the installed packages have."""

from __future__ import annotations

import ast
import hashlib
import re
from pathlib import Path

import pytest

from ppcr.errors import EngineError
from runtime import device
from runtime.tensorrt_library import TensorRT
from tests import record_signatures
from tests.recorded import table

ROOT = Path(__file__).resolve().parents[1]


def test_every_cuda_function_called_is_in_the_table() -> None:
    tree = ast.parse((ROOT / "runtime/device.py").read_text())
    named = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.match(r"cuda\w+$", node.value)
    }
    named |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr.startswith("cuda")}
    recorded = table("cuda_python")
    known = {*recorded["functions"], *recorded["enumerations"], *recorded["flags"]}
    known |= {member for members in recorded["enumerations"].values() for member in members}
    assert named - known == set()


def test_table_is_that_of_the_installed_cuda_python() -> None:
    pytest.importorskip(
        "cuda.bindings.runtime", reason="cuda-python is not installed: pip install '.[tensorrt]'"
    )
    found, recorded = record_signatures.cuda(), table("cuda_python")
    assert {k: v for k, v in found.items() if k != "release"} == {
        k: v for k, v in recorded.items() if k != "release"
    }


def test_table_is_that_of_the_installed_tensorrt() -> None:
    module = pytest.importorskip(
        "tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install '.[tensorrt]'"
    )
    assert record_signatures.tensorrt(module)["methods"] == table("tensorrt_rtx")["methods"]
    for name in ("OLD_CUDA_DRIVER", "UNSUPPORTED_CC", "VERSION_MISMATCH", "MALFORMED_ENGINE"):
        assert name in module.EngineInvalidityDiagnostics.__members__
    assert module.CudaGraphStrategy.DISABLED is not None
    assert module.DataType.HALF.itemsize == 2 and module.DataType.BOOL.itemsize == 1


def test_real_bindings_say_that_there_is_no_gpu() -> None:
    runtime = pytest.importorskip(
        "cuda.bindings.runtime", reason="cuda-python is not installed: pip install '.[tensorrt]'"
    )
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU here")
    with pytest.raises(EngineError, match="NVIDIA driver|no GPU"):
        device.current_device()


def test_real_library_refuses_a_damaged_engine() -> None:
    module = pytest.importorskip(
        "tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install '.[tensorrt]'"
    )
    library = TensorRT(module, "tensorrt_rtx", module.__version__)
    runtime = library.create_runtime()
    digest = hashlib.sha256(b"not an engine").digest()
    assert library.refusal(runtime, digest * 4)
