"""Products in fp8: what is rounded, by which scales, and what calibration measures for them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from export import engines
from export.calibration import Watched, calibrate, watch
from export.constants import Constants, product_weights
from export.float8 import LARGEST, to_float8
from export.typed_graph import at_precision
from ppcr.errors import BundleError
from ppcr.manifest import ROLES, Manifest


def product(weights: dict[str, np.ndarray], *, head: bool = False) -> onnx.ModelProto:
    """x @ first, and x @ each of the others; with ``head`` the last is called lm_head.weight."""
    names = [*weights]
    if head:
        weights = {"lm_head.weight" if name == names[-1] else name: w for name, w in weights.items()}
    nodes = [
        helper.make_node("MatMul", ["x", name], [f"y{i}"], name=f"p{i}") for i, name in enumerate(weights)
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", next(iter(weights.values())).shape[0]])],
        [
            helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["n", w.shape[1]])
            for i, w in enumerate(weights.values())
        ],
        [numpy_helper.from_array(w, name) for name, w in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    # As written: an optimiser may take a rounding and its undoing for nothing.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {"x": x})
    return found


def rounded(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return (
        np.clip(values / scale, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    )


def test_both_sides_are_rounded_and_the_head_is_not() -> None:
    rng = np.random.default_rng(1)
    weights = {f"w{i}": rng.normal(size=(37, 5 + i)).astype(np.float32) for i in range(3)}
    weights["w0"][:, 2] = 0
    x = rng.normal(0, 3, (11, 37)).astype(np.float32)
    model = product(weights, head=True)
    largest = 0.75 * float(np.abs(x).max())  # less than there is: the rest is cut off
    to_float8(model, {"w0": largest, "w1": largest, "lm_head.weight": 1.0}, Constants())
    onnx.checker.check_model(model)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == 1, "one value is rounded once"
    assert kinds.count("DequantizeLinear") == 3
    got = run(model, x)
    read = rounded(x, np.asarray(largest / LARGEST, np.float32))
    for name, found in zip(("w0", "w1"), got, strict=False):
        scale = np.maximum(np.abs(weights[name]).max(0) / LARGEST, 2.0**-14).astype(np.float32)
        np.testing.assert_allclose(found, read @ rounded(weights[name], scale), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got[2], x @ weights["w2"], rtol=1e-5, atol=1e-5)


def test_a_matrix_without_a_range_stays_as_it_is() -> None:
    model = product({"w": np.ones((4, 4), np.float32)})
    before = [node.op_type for node in model.graph.node]
    to_float8(model, {}, Constants())
    assert [node.op_type for node in model.graph.node] == before


def test_ranges_are_the_largest_of_all_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    model = product({"a": np.eye(6, dtype=np.float32), "b": np.ones((6, 2), np.float32)})
    onnx.save(model, tmp_path / "g.onnx")
    (tmp_path / "watched").mkdir()
    graph = Watched.open(tmp_path / "g.onnx", "vision", tmp_path / "watched")
    assert [value.name for value in graph.get_outputs()] == ["y0", "y1"]
    inputs = [rng.normal(size=(3, 6)).astype(np.float32) for _ in range(4)]
    for x in inputs[:2]:
        (found,) = graph.run(["y0"], {"x": x})
        np.testing.assert_allclose(found, x)
    for x in inputs[2:]:
        binding = graph.io_binding()
        binding.bind_cpu_input("x", x)
        binding.bind_output("y1")
        graph.run_with_iobinding(binding)
    largest = max(float(np.abs(x).max()) for x in inputs)
    assert graph.ranges == pytest.approx({"a": largest, "b": largest})


def test_matrices_that_must_stay_exact_are_not_watched() -> None:
    model = product({"a.heads": np.eye(3, dtype=np.float32), "b": np.eye(3, dtype=np.float32)})
    assert watch(model, r"heads$") == {"range of x": ["b"]}


def test_calibration_sees_every_product_of_the_bundle(bundle: Path) -> None:
    told = list[str]()
    ranges = calibrate(bundle, told.append, scenes=2)
    assert told == ["calibration"] * 2
    assert set(ranges) == set(ROLES)
    for role in ROLES:
        held = product_weights(onnx.load(bundle / Manifest.load(bundle).paths("fp32")[role]))
        left_out = {value.name for value in held} - set(ranges[role])
        assert all(role == "mask_decoder" and "head" in n or "prompt_encoder" in n for n in left_out)
        assert "lm_head.weight" not in ranges[role]
        # A scene without a target draws no mask; two scenes of "train" have one.
        assert ranges[role] and all(0 < value < 1e4 for value in ranges[role].values())


def test_a_bundle_without_fp32_cannot_be_calibrated(bundle: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(bundle)
    whole = dataclasses.replace(
        manifest, precisions={"int8": manifest.precisions["int8"]}, default_precision="int8"
    )
    whole.save(tmp_path)
    with pytest.raises(BundleError, match="fp8 is calibrated with fp32 graphs"):
        calibrate(tmp_path, lambda name: None)


def test_decoder_is_built_with_products_in_fp8(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install '.[tensorrt]'")
    manifest = Manifest.load(bundle)
    graph = onnx.load(bundle / manifest.paths("fp32")["decoder"])
    ranges = {value.name: 8.0 for value in product_weights(graph)}
    sizes = {}
    for precision in ("fp8", "fp16"):
        place = str(tmp_path / f"{precision}.engine")
        job = engines.make_job(manifest, bundle, "decoder", "sm_89", precision, place)
        built = engines.run(dataclasses.replace(job, timings=None, ranges=ranges), lambda told: None)
        sizes[precision] = built.weight_bytes
        assert built.native["QUANTIZE"] if precision == "fp8" else "QUANTIZE" not in built.native
    assert sizes["fp8"] < 0.65 * sizes["fp16"]


@pytest.mark.parametrize("role", ["image_encoder", "decoder"])
def test_typed_graph_holds_fp8_on_both_sides(bundle: Path, role: str) -> None:
    manifest = Manifest.load(bundle)
    model = onnx.load(bundle / manifest.paths("fp32")[role])
    ranges = {value.name: 4.0 for value in product_weights(model)}
    job = engines.make_job(manifest, bundle, role, "sm_89", "fp8", "x.engine")
    at_precision(model, "fp8", job.carried, ranges=ranges)
    kinds = {value.name: value.data_type for value in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    products = [
        node for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in ranges
    ]  # fmt: skip
    assert len(products) == len(ranges) > 0
    for node in products:
        left, right = (makers[name] for name in node.input)
        assert left.op_type == right.op_type == "DequantizeLinear"
        assert kinds[right.input[0]] == TensorProto.FLOAT8E4M3FN
        assert kinds[right.input[1]] == kinds[left.input[1]] == TensorProto.FLOAT16
        assert makers[left.input[0]].op_type == "QuantizeLinear"
