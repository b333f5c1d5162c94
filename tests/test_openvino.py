"""OpenVINO against onnxruntime on the same graphs; skipped where it is not installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ppcr import masks
from ppcr.errors import BundleError, EngineError
from runtime import onnxruntime_session
from runtime.bundle import Bundle
from runtime.pipeline import Pipeline
from runtime.session import Prompts, load_sessions

ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install '.[openvino]'")

from runtime import openvino_session  # noqa: E402


@pytest.fixture(scope="module")
def loaded(bundle: Path) -> Bundle:
    return Bundle.load(bundle, precision="fp32")


def spread(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square of the difference, over the spread of ``a``; scores alike hardly spread, so 0.1."""
    return float(np.sqrt(np.mean((a - b) ** 2)) / max(a.std(), 0.1))


@pytest.mark.parametrize(("kind", "most"), [("fp32", 1e-4), ("bf16", 5e-2)])
def test_graphs_agree_with_onnxruntime(loaded: Bundle, kind: str, most: float) -> None:
    if kind == "bf16" and not openvino_session.has_bf16(ov.Core()):
        pytest.skip("this processor has no bfloat16 instructions")
    ours = load_sessions("openvino", loaded, threads=1, precision=kind)
    theirs = load_sessions("onnxruntime", loaded, threads=1)
    assert ours.precision == kind
    rng, shapes = np.random.default_rng(5), loaded.manifest.shapes
    patches = rng.normal(size=(shapes.patches, shapes.patch_dim)).astype(np.float32)
    assert spread(theirs.mllm.encode_image(patches), ours.mllm.encode_image(patches)) < most
    pixels = rng.normal(size=(3, *shapes.image_size)).astype(np.float32)
    count = 3
    boxes = np.sort(rng.random((count, 2, 2), np.float32), 1).reshape(count, 4)
    text = rng.normal(size=(count, 5, shapes.hidden)).astype(np.float32)
    prompts = Prompts(
        boxes, boxes[:, :2].copy(), np.ones(count, np.float32), text, np.ones((count, 5), np.bool_)
    )
    answers = [s.segmenter.decode(s.segmenter.encode(pixels), prompts) for s in (theirs, ours)]
    for one, other in zip(*answers, strict=True):
        assert one.shape == other.shape
        assert spread(one, other) < most


def test_pipeline_gives_the_masks_of_onnxruntime(bundle: Path, samples: Path) -> None:
    pipelines = [
        Pipeline.load(bundle, precision="fp32", threads=2, engine=b) for b in ("onnxruntime", "openvino")
    ]
    for number in range(2):
        results = [p.open(samples / f"scene_{number}.png").segment("the small cube") for p in pipelines]
        one, other = results
        assert one.semantic == other.semantic
        assert masks.iou(one.mask, other.mask) > 0.95
        assert other.engine["engine"] == "openvino"
        # In bf16 only where it is asked for, or its parity gate passed.
        assert other.engine["precision"] == "fp32"


def test_bf16_needs_a_processor_that_has_it(loaded: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_session, "has_bf16", lambda core: False)
    with pytest.raises(EngineError, match="no bfloat16 instructions"):
        openvino_session.load(loaded, threads=1, precision="bf16")


def test_features_of_two_images_do_not_share_memory(loaded: Bundle) -> None:
    sessions = openvino_session.load(loaded, threads=1)
    shapes = loaded.manifest.shapes
    first = sessions.segmenter.encode(np.zeros((3, *shapes.image_size), np.float32))
    kept = {name: value.copy() for name, value in first.items()}
    sessions.segmenter.encode(np.ones((3, *shapes.image_size), np.float32))
    for name, value in first.items():
        np.testing.assert_array_equal(value, kept[name])


def test_unreadable_graph_is_one_line(loaded: Bundle, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="OpenVINO .* cannot read .*x.onnx") as caught:
        openvino_session._compile(ov.Core(), tmp_path / "x.onnx", 1)
    assert "\n" not in str(caught.value)


def test_segmenter_of_onnxruntime_loads_alone(loaded: Bundle) -> None:
    pixels = np.zeros((3, *loaded.manifest.shapes.image_size), np.float32)
    segmenter = onnxruntime_session.load_segmenter(loaded, threads=1)
    with_openvino = openvino_session.load(loaded, threads=1).segmenter
    assert set(segmenter.encode(pixels)) == set(with_openvino.encode(pixels))
