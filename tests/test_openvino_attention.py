"""Attention without the image axis is the same attention, and OpenVINO makes one kernel of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.bundle import Bundle
from runtime.onnxruntime_library import write_out_functions

ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install '.[openvino]'")

from openvino import opset13 as op  # noqa: E402

from runtime import openvino_library  # noqa: E402
from runtime.openvino_attention import drop_image_axis  # noqa: E402
from runtime.openvino_session import load_segmenter  # noqa: E402

HEADS, WIDTH = 3, 16


def attention(
    count: int, queries: int, keys: int, *, biased: bool, turned: bool = True, axis: int = 1
) -> Any:
    """[axis, count, queries, HEADS * WIDTH] over the keys of one image; heads are turned and turned back."""
    shapes = {"q": (axis, count, queries), "k": (axis, 1, keys), "v": (axis, count, keys)}
    inputs = {name: op.parameter([*shape, HEADS * WIDTH], np.float32) for name, shape in shapes.items()}

    def heads(name: str) -> Any:
        split = op.reshape(inputs[name], op.constant(np.array([*shapes[name], HEADS, WIDTH])), False)
        return op.transpose(split, op.constant(np.array([0, 1, 3, 2, 4])))

    scores = op.matmul(op.multiply(heads("q"), np.float32(0.25)), heads("k"), False, True)
    if biased:
        inputs["bias"] = op.parameter([axis, count, 1, 1, keys], np.float32)
        scores = op.add(scores, inputs["bias"])
    out = op.matmul(op.softmax(scores, -1), heads("v"), False, False)
    if turned:
        out = op.transpose(out, op.constant(np.array([0, 1, 3, 2, 4])))
        out = op.reshape(out, op.constant(np.array([axis, count, queries, HEADS * WIDTH])), False)
    for name, given in inputs.items():
        given.output(0).set_names({name})
    result = op.result(out)
    result.output(0).set_names({"out"})
    return ov.Model([result], list(inputs.values()), "attention")


def run(model: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    compiled = openvino_library.compile_model(ov.Core(), model, Path("attention"), 1)
    return openvino_library.Graph(compiled).run(feeds)["out"]


def layers(compiled: Any) -> set[str]:
    """The kinds of layers that compute a graph."""
    return {str(node.get_rt_info()["layerType"].value) for node in compiled.get_runtime_model().get_ops()}


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("count", "queries", "keys"), [(1, 13, 300), (3, 257, 5), (4, 7, 7)])
def test_the_same_is_computed(count: int, queries: int, keys: int, biased: bool, turned: bool) -> None:
    rng = np.random.default_rng()
    model = attention(count, queries, keys, biased=biased, turned=turned)
    feeds = {given.any_name: rng.normal(size=list(given.shape)).astype(np.float32) for given in model.inputs}
    wanted = run(model, feeds)
    assert drop_image_axis(model) == 1
    found = run(model, feeds)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert drop_image_axis(model) == 0


def test_images_side_by_side_and_other_graphs_are_left_alone() -> None:
    assert drop_image_axis(attention(3, 5, 7, biased=True, axis=2)) == 0
    given = op.parameter([1, 2, 3, 4, 4], np.float32)
    # Softmaxes of five axes that are no attention, or none of this form.
    scores = op.matmul(given, given, False, True)
    others = {
        "no products": op.relu(op.softmax(given, -1)),
        "weights on the right": op.matmul(given, op.softmax(scores, -1), False, False),
    }
    for name, out in others.items():
        assert drop_image_axis(ov.Model([op.result(out)], [given], name)) == 0, name


def test_operands_without_the_axis_are_taken_as_they_are() -> None:
    rng = np.random.default_rng()
    given, bias = op.parameter([1, 2, 3, 4, 8], np.float32), op.parameter([2, 1, 1, 6], np.float32)
    shared = rng.normal(size=(3, 6, 8)).astype(np.float32)  # keys and values for all prompts
    scores = op.add(op.matmul(given, op.constant(shared), False, True), bias)
    result = op.result(op.matmul(op.softmax(scores, -1), op.constant(shared), False, False))
    for name, one in (("x", given), ("bias", bias), ("out", result)):
        one.output(0).set_names({name})
    model = ov.Model([result], [given, bias], "shared")
    feeds = {"x": rng.normal(size=(1, 2, 3, 4, 8)), "bias": rng.normal(size=(2, 1, 1, 6))}
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    wanted = run(model, feeds)
    assert drop_image_axis(model) == 1
    np.testing.assert_allclose(run(model, feeds), wanted, atol=1e-5)


def test_the_shipped_decoders_attentions_become_kernels(loaded: Bundle) -> None:
    path = loaded.graphs["mask_decoder"]
    with tempfile.TemporaryDirectory() as folder:
        model = openvino_library.read(ov.Core(), write_out_functions(path, Path(folder)))
    softmaxes = sum(node.get_type_name() == "Softmax" for node in model.get_ops())
    assert drop_image_axis(model) == softmaxes > 5
    segmenter = load_segmenter(loaded, threads=1, precision="fp32")
    assert "Softmax" not in layers(segmenter._graph(1, 1).result()._compiled)
