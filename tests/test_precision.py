"""int8 weights: a quarter of the size, the same answers for weights on the grid, close ones for others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from export.graph import GraphWriter
from export.precision import file_name, quantise
from ppcr.int8 import snap


def write_graph(path: Path, *, on_grid: bool) -> None:
    """Two products with a matrix that is not to be touched after them."""
    rng = np.random.default_rng(4)
    graph = GraphWriter(opset=24)
    x = graph.input("x", ["M", 96])
    for name, rows, columns in (("first", 80, 96), ("second", 64, 80)):
        weight = rng.standard_normal((rows, columns)).astype(np.float32)
        x = graph.linear(x, name, snap(weight) if on_grid else weight, np.ones(rows, np.float32))
    graph.output("y", ["M", 48])
    head = graph.weight("lm_head.weight", rng.standard_normal((64, 48)))
    graph.node("MatMul", [x, head], "y")
    graph.save("graph", path)


def run(path: Path, x: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("on_grid", [True, False])
def test_answers(tmp_path: Path, on_grid: bool) -> None:
    write_graph(tmp_path / "fp32.onnx", on_grid=on_grid)
    quantise("decoder", tmp_path / "fp32.onnx", tmp_path / "int8.onnx")
    x = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    wanted, got = run(tmp_path / "fp32.onnx", x), run(tmp_path / "int8.onnx", x)
    if on_grid:
        np.testing.assert_array_equal(got, wanted)
    else:
        error = np.abs(got - wanted).mean() / np.abs(wanted).mean()
        assert 0 < error < 0.02


def test_file_shrinks_and_the_head_stays(tmp_path: Path) -> None:
    write_graph(tmp_path / "fp32.onnx", on_grid=True)
    quantise("vision", tmp_path / "fp32.onnx", tmp_path / "int8.onnx")
    sizes = {name: (tmp_path / f"{name}.onnx").stat().st_size for name in ("fp32", "int8")}
    head = 64 * 48 * 4
    assert sizes["int8"] - head < 0.4 * (sizes["fp32"] - head)
    types = {value.name: value.data_type for value in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert types["lm_head.weight"] == onnx.TensorProto.FLOAT
    assert types["first.weight.int8"] == onnx.TensorProto.INT8
    assert "first.weight" not in types


def test_file_names() -> None:
    assert file_name("mllm/decoder.onnx", "fp32") == "mllm/decoder.onnx"
    assert file_name("mllm/decoder.onnx", "int8") == "mllm/decoder.int8.onnx"
