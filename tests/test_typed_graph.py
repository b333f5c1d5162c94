"""Engine precisions as graphs: onnxruntime runs what TensorRT would compile, and agrees with fp32."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.engines import make_job, profiles, role_precision
from export.typed_graph import INT4_BLOCK, at_precision, fix_dimensions, fold, require_precision
from ppcr.errors import UsageError
from ppcr.manifest import ROLES, Manifest
from tests.roundings import HALF, allowed, error, products_in_a_row

SIZES = {"W": 1, "B": 1, "S": 7, "N": 3, "T": 5}


def graph(bundle: Path, role: str) -> onnx.ModelProto:
    return onnx.load(bundle / Manifest.load(bundle).paths("fp32")[role])


def typed(bundle: Path, role: str, precision: str) -> onnx.ModelProto:
    job = make_job(Manifest.load(bundle), bundle, role, "sm_89", precision, "x.engine")
    model = graph(bundle, role)
    fix_dimensions(model, job.fixed)
    assert job.precision is not None
    at_precision(model, job.precision, job.carried)
    return model


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def inputs(bundle: Path, role: str, seed: int) -> dict[str, np.ndarray]:
    """Random float32 inputs of a role's fp32 graph at odd sizes, its cache at its full length."""
    rng = np.random.default_rng(seed)
    length = Manifest.load(bundle).shapes.max_length
    found: dict[str, np.ndarray] = {}
    for value in graph(bundle, role).graph.input:
        shape = [d.dim_value or {**SIZES, "L": length}[d.dim_param] for d in value.type.tensor_type.shape.dim]
        kind = value.type.tensor_type.elem_type
        if kind == TensorProto.INT64:
            found[value.name] = np.full(shape, 6 if value.name == "logits_index" else 0, np.int64)
        elif kind == TensorProto.BOOL:
            found[value.name] = np.ones(shape, np.bool_)
        elif value.name in ("boxes", "points", "spatial_valid"):
            found[value.name] = rng.random(shape, np.float32)
        else:
            found[value.name] = rng.normal(0, 0.5, shape).astype(np.float32)
    if role == "decoder":
        found["attn_mask"][...] = np.tri(7, length, dtype=np.bool_)
        angles = rng.uniform(0, 6, found["rope_cos"].shape).astype(np.float32)
        found["rope_cos"], found["rope_sin"] = np.cos(angles), np.sin(angles)
        for name in found:
            if "_cache_" in name:
                found[name][...] = 0
    return found


def narrowed(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``feed`` in the types that the inputs of ``model`` have."""
    half = {
        value.name for value in model.graph.input if value.type.tensor_type.elem_type == TensorProto.FLOAT16
    }
    return {name: value.astype(np.float16) if name in half else value for name, value in feed.items()}


def errors(bundle: Path, role: str, model: onnx.ModelProto) -> dict[str, tuple[float, float]]:
    """By output of ``model``: its error against the fp32 graph, and what roundings explain."""
    reference, feed = session(graph(bundle, role)), inputs(bundle, role, seed=len(role))
    names = [value.name for value in reference.get_outputs()]
    assert [value.name for value in model.graph.output] == names
    wanted, got = reference.run(None, feed), session(model).run(None, narrowed(model, feed))
    products = products_in_a_row(model)
    return {
        name: (error(name, a, b), allowed(products[name]))
        for name, a, b in zip(names, wanted, got, strict=True)
    }


@pytest.mark.parametrize("role", ROLES)
def test_half_precision_is_off_by_its_roundings_alone(bundle: Path, role: str) -> None:
    for name, (found, most) in errors(bundle, role, typed(bundle, role, "fp16")).items():
        assert found <= most, f"{name}: {found / HALF:.1f} roundings of its spread, {most / HALF:.1f} allowed"


@pytest.mark.parametrize("role", ROLES)
def test_three_bits_less_would_be_noticed(bundle: Path, role: str) -> None:
    # The same graph with weights of bfloat16's eight bits: the bound above is no bound for that.
    model = typed(bundle, role, "fp16")
    for value in model.graph.initializer:
        if value.data_type == TensorProto.FLOAT16:
            coarse = numpy_helper.to_array(value).astype(ml_dtypes.bfloat16).astype(np.float16)
            value.CopyFrom(numpy_helper.from_array(coarse, value.name))
    assert any(found > most for found, most in errors(bundle, role, model).values())


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_host_feeds_float32_and_the_device_keeps_its_own(bundle: Path, role: str, precision: str) -> None:
    model = typed(bundle, role, precision)
    kind = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    carried = (
        {"image_features", "high_res_0", "high_res_1"} if role in ("image_encoder", "mask_decoder") else ()
    )
    for value in (*model.graph.input, *model.graph.output):
        found = value.type.tensor_type.elem_type
        if found in (TensorProto.BOOL, TensorProto.INT64):
            continue
        inner = value.name in carried or "_cache_" in value.name
        assert found == (kind if inner else TensorProto.FLOAT), value.name
    products = {n for node in model.graph.node if node.op_type == "MatMul" for n in node.input}
    weights = [value for value in model.graph.initializer if value.name in products]
    assert weights
    assert {value.data_type for value in weights if "gaussian" not in value.name} >= {kind}


def test_cache_has_one_length(bundle: Path) -> None:
    length = Manifest.load(bundle).shapes.max_length
    model = typed(bundle, "decoder", "fp16")
    caches = [v for v in (*model.graph.input, *model.graph.output) if "_cache_" in v.name]
    assert caches
    assert {v.type.tensor_type.shape.dim[2].dim_value for v in caches} == {length}


def product(weight: np.ndarray, opset: int = 20) -> onnx.ModelProto:
    value = numpy_helper.from_array(weight, "w")
    made = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weight.shape[1]])],
        [value],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@pytest.mark.parametrize(
    ("levels", "block", "kind"), [(127, None, TensorProto.INT8), (7, 64, TensorProto.INT4)]
)
def test_folded_weights_are_the_nearest_on_their_grid(levels: int, block: int | None, kind: int) -> None:
    rng = np.random.default_rng(levels)
    weight = rng.normal(size=(3 * INT4_BLOCK, 37)).astype(np.float32)
    weight[:, 5] = 0
    model = product(weight)
    fold(model, block=block, levels=levels, kind=kind)
    onnx.checker.check_model(model)
    assert [
        v.data_type for v in model.graph.initializer if v.name.startswith("w.") and "scale" not in v.name
    ] == [kind]
    read = session(model).run(None, {"x": np.eye(len(weight), dtype=np.float32)})[0]
    parts = weight.reshape(-1, block or len(weight), 37)
    step = np.abs(parts).max(1, keepdims=True) / levels
    assert (np.abs(read.reshape(parts.shape) - parts) <= step / 2 + 1e-6).all()
    assert (read[:, 5] == 0).all()


def test_matrices_that_do_not_fill_blocks_stay_whole() -> None:
    weight = np.random.default_rng(0).normal(size=(65, 8)).astype(np.float32)
    model = product(weight)
    fold(model, block=64, levels=7, kind=TensorProto.INT4)
    assert [node.op_type for node in model.graph.node] == ["MatMul"]


def test_only_the_decoder_is_folded() -> None:
    assert [role_precision(role, "int4") for role in ROLES] == ["fp16", "int4", "fp16", "fp16"]
    for precision in ("bf16", "fp8"):
        assert {role_precision(role, precision) for role in ROLES} == {precision}


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_other_precisions_are_refused_with_the_reason(precision: str) -> None:
    with pytest.raises(UsageError, match="give --precision fp16, bf16, fp8, int8, int4"):
        require_precision(precision)


def test_profiles_cover_what_the_runtime_feeds(bundle: Path) -> None:
    shapes = Manifest.load(bundle).shapes
    step, block = profiles("decoder", shapes)
    assert step == {"S": (1, 1, 1), "L": (shapes.max_length,) * 3, "W": (1, 1, 1)}
    assert block["S"][0] == 1 and block["S"][2] == shapes.max_length
    (prompts,) = profiles("mask_decoder", shapes)
    assert prompts["T"][2] == shapes.max_text and prompts["N"][2] >= 64
    for ranges in (step, block, prompts):
        assert all(least <= usual <= most for least, usual, most in ranges.values())
