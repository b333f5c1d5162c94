"""Coordinates stay in float32 where OpenVINO computes in bfloat16."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from runtime.bundle import Bundle
from runtime.session import Prompts, Sessions, load_sessions

ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install '.[openvino]'")

from openvino import opset13 as op  # noqa: E402

from runtime import openvino_library  # noqa: E402
from runtime.openvino_angles import cut_angles  # noqa: E402


def graph_of_angles(waves: np.ndarray) -> openvino_library.Model:
    """sin and cos of boxes [N, 4] @ waves [4, K], side by side, plus what does not pass through an angle."""
    boxes = op.parameter([-1, 4], ov.Type.f32, name="boxes")
    boxes.output(0).set_names({"boxes"})
    other = op.parameter([-1, 1], ov.Type.f32, name="other")
    other.output(0).set_names({"other"})
    angles = op.matmul(boxes, op.constant(waves), False, False)
    still = op.sin(op.constant(np.ones((1, 1), np.float32)))  # depends on no input: it stays
    both = op.concat([op.sin(angles), op.cos(angles)], 1)
    return ov.Model([op.add(op.multiply(both, still), other)], [boxes, other], "angles")


def run(model: openvino_library.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    request.infer(feeds)
    return {
        output.any_name: request.get_tensor(output).data.copy() for output in compiled.outputs if output.names
    }


@pytest.mark.parametrize("count", [1, 3, 17])
def test_both_parts_compute_what_the_whole_does(count: int) -> None:
    rng = np.random.default_rng()
    waves = rng.normal(size=(4, 5)).astype(np.float32)
    boxes, other = rng.random((count, 4), np.float32), rng.random((count, 1), np.float32)
    rest = graph_of_angles(waves)
    angles = cut_angles(rest)
    assert angles is not None
    assert [given.any_name for given in angles.inputs] == ["boxes"]
    sines = run(angles, {"boxes": boxes})
    assert sorted(sines) == ["sine_0", "sine_1"]
    np.testing.assert_allclose(sines["sine_0"], np.sin(boxes @ waves), atol=1e-5)
    np.testing.assert_allclose(sines["sine_1"], np.cos(boxes @ waves), atol=1e-5)
    compiled = ov.Core().compile_model(rest, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    # The boxes no longer matter to the rest.
    found = compiled({"boxes": np.zeros_like(boxes), "other": other, **sines})[0]
    wanted = np.concatenate([np.sin(boxes @ waves), np.cos(boxes @ waves)], 1) * np.sin(1.0) + other
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_graph_without_angles_is_left_alone() -> None:
    given = op.parameter([2], ov.Type.f32, name="x")
    model = ov.Model([op.add(given, op.sin(op.constant(np.ones(2, np.float32))))], [given], "plain")
    assert cut_angles(model) is None
    assert len(model.inputs) == 1


def test_neighbouring_pixels_are_told_apart_in_bf16(loaded: Bundle, half: Sessions) -> None:
    rng, shapes = np.random.default_rng(3), loaded.manifest.shapes
    features = half.segmenter.encode(rng.normal(size=(3, *shapes.image_size)).astype(np.float32))
    box = np.array([[0.51, 0.52, 0.77, 0.78]], np.float32)
    text, told = np.zeros((1, 1, shapes.hidden), np.float32), np.zeros((1, 1), np.bool_)
    at = Prompts(box, box[:, :2].copy(), np.ones(1, np.float32), text, told)
    # A thousandth of the image: in bfloat16, two of these three boxes would be the same.
    drawn = [
        half.segmenter.decode(features, replace(at, boxes=box + np.float32(step / 1000)))[0]
        for step in range(3)
    ]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert not np.array_equal(drawn[one], drawn[other])


def test_float32_needs_no_cut(loaded: Bundle) -> None:
    sessions = load_sessions("openvino", loaded, threads=1, precision="fp32")
    assert sessions.segmenter._angles is None  # type: ignore[attr-defined]
