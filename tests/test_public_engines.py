"""A public MLLM's graphs as engines compile them: typed anew or already, int4 as the bundle holds it.

onnxruntime runs what TensorRT would compile; where tensorrt_rtx is installed, it does compile it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from export import engines
from export.constants import Constants, is_outside
from export.engine_layers import cache_is_in_place
from export.external import ExternalData
from ppcr.errors import BundleError
from ppcr.manifest import ROLES, Manifest
from tests.families import worst
from tests.public_bundle import make_public, typed
from tests.test_pretrained_bundle import MAX_LENGTH, SIZES

HELD = ("fp32", "fp16", "int4")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def public(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle around a random public MLLM, at `HELD`."""
    return make_public(request.param, tmp_path_factory.mktemp(request.param), HELD)


def answers(model: onnx.ModelProto | Path, length: int, seed: int) -> dict[str, np.ndarray]:
    """Outputs of a decoder or a tower for random inputs, in the types that it takes."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    given: Any = model if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    rng, feed = np.random.default_rng(seed), dict[str, np.ndarray]()
    sizes = {"S": 5, "L": length, "W": 1}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else sizes[size] for size in value.shape]
        if value.type == "tensor(int64)":
            feed[value.name] = np.full(shape, 4 if value.name == "logits_index" else 0, np.int64)
        elif value.type == "tensor(bool)":
            feed[value.name] = np.tri(5, length, dtype=np.bool_)[None, None]
        else:
            kind = np.float16 if value.type == "tensor(float16)" else np.float32
            still = "_cache_" in value.name
            feed[value.name] = (0 * rng.normal(size=shape) if still else rng.normal(size=shape)).astype(kind)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize(("precision", "source"), [("fp16", "fp16"), ("int4", "int4"), ("int8", "fp16")])
def test_decoder_is_what_the_bundle_holds(public: Path, tmp_path: Path, precision: str, source: str) -> None:
    manifest = Manifest.load(public)
    assert engines.source_of(manifest, "decoder", precision) == source
    _, model = typed(public, "decoder", precision, tmp_path)
    for value in (*model.graph.input, *model.graph.output):
        kind = value.type.tensor_type.elem_type
        if kind in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            inner = "_cache_" in value.name
            assert kind == (onnx.TensorProto.FLOAT16 if inner else onnx.TensorProto.FLOAT), value.name
            assert not inner or value.type.tensor_type.shape.dim[2].dim_value == MAX_LENGTH
    wanted = answers(public / manifest.paths("int4" if precision == "int4" else "fp32")["decoder"], 32, 3)
    got = answers(with_length(model, 32), 32, 3)
    # onnxruntime's product with int4 weights is off by itself, int8 has one scale for a whole column.
    most = {"fp16": 0.02, "int4": 0.06, "int8": 0.15}[precision]
    assert worst(got["logits"], wanted["logits"]) < most
    numbers = {v.data_type for v in model.graph.initializer if len(v.dims) == 2}
    whole = {"int4": onnx.TensorProto.INT4, "int8": onnx.TensorProto.INT8}.get(precision)
    assert whole is None or whole in numbers


def with_length(model: onnx.ModelProto, length: int) -> onnx.ModelProto:
    """The same decoder with a cache of ``length`` tokens: random inputs stay small."""
    for value in (*model.graph.input, *model.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_value == MAX_LENGTH:
                dimension.dim_value = length
    return model


def test_tower_of_every_image_size_is_compiled(public: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(public)
    further = [role for role in manifest.engine_roles if role not in ROLES]
    assert len(further) == len(next(iter(SIZES.values()))) - 1
    for role in ("vision", *further):
        place = tmp_path / role
        place.mkdir()
        _, model = typed(public, role, "fp16", place)
        wanted, got = answers(public / manifest.paths("fp32")[role], 0, 5), answers(model, 0, 5)
        assert set(got) == set(wanted)
        for name, value in wanted.items():
            assert got[name].dtype == np.float32
            assert worst(got[name], value) < 0.02, name


def test_segmenter_is_compiled_from_its_fp32_graphs(public: Path) -> None:
    manifest = Manifest.load(public)
    for precision in ("fp16", "int8", "int4"):
        for role in ("image_encoder", "mask_decoder"):
            job = engines.make_job(manifest, public, role, "sm_89", precision, "x.engine")
            assert Path(job.source).name == f"{role}.onnx" and job.precision == "fp16"


def test_bundle_without_a_graph_to_compile_says_which_to_add(public: Path) -> None:
    manifest = Manifest.load(public)
    whole = dataclasses.replace(
        manifest, precisions={"int4": manifest.precisions["int4"]}, default_precision="int4"
    )
    assert engines.source_of(whole, "decoder", "int4") == "int4"
    for role in ("vision", "image_encoder"):
        with pytest.raises(BundleError, match="--force --precision int4,fp16"):
            engines.source_of(whole, role, "int4")


def test_constants_beside_a_model_are_converted_beside_it(tmp_path: Path) -> None:
    rng, source, made = np.random.default_rng(1), tmp_path / "a", tmp_path / "b"
    source.mkdir()
    made.mkdir()
    array = rng.normal(size=(700, 40)).astype(np.float32)
    with ExternalData(source / "x.data") as data:
        outside = data.add("w", onnx.TensorProto.FLOAT, array.shape, [array[:300], array[300:]])
    with ExternalData(made / "y.data") as data:
        held = Constants(source, data)
        np.testing.assert_array_equal(held.array(outside), array)
        half = held.keep(
            "w.half", onnx.TensorProto.FLOAT16, held.array(outside), lambda part: part.astype(np.float16)
        )
        data.flush()
    assert is_outside(half) and not half.raw_data
    np.testing.assert_array_equal(Constants(made).array(half), array.astype(np.float16))


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_decoder_is_built(public: Path, tmp_path: Path, precision: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install '.[tensorrt]'")
    manifest, place = Manifest.load(public), tmp_path / "d.engine"
    job = engines.make_job(manifest, public, "decoder", "sm_89", precision, str(place))
    built = engines.run(dataclasses.replace(job, timings=None), lambda told: None)
    layers = manifest.shapes.layers
    assert built.native["KV_CACHE_UPDATE"] == 2 * layers
    assert built.native["ATTENTION_INPUT"] == layers
    assert built.bytes == place.stat().st_size > 0
    assert built.seconds > 0 and built.peak_bytes > 50_000_000
    assert cache_is_in_place(built, layers)
    for piece in built.pieces:
        assert sum(kernel.is_attention for kernel in built.piece(piece)) == layers
