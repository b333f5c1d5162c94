"""OpenVINO against onnxruntime on the same graphs; skipped where it is not installed."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppcr import masks
from ppcr.errors import BundleError, EngineError
from ppcr.int8 import fit, snap
from runtime import onnxruntime_context, onnxruntime_session
from runtime.bundle import Bundle
from runtime.pipeline import Pipeline
from runtime.session import Prompts, Sessions, load_sessions
from tests import factory

ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install '.[openvino]'")

from openvino import opset13 as op  # noqa: E402

from runtime import (  # noqa: E402
    openvino_block,
    openvino_context,
    openvino_decoder,
    openvino_library,
    openvino_segmenter,
    openvino_session,
    openvino_step,
    openvino_tower,
)


@pytest.fixture(scope="module")
def ours(loaded: Bundle) -> Sessions:
    return load_sessions("openvino", loaded, threads=1)


@pytest.fixture(scope="module")
def theirs(loaded: Bundle) -> Sessions:
    return load_sessions("onnxruntime", loaded, threads=1)


def spread(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square of the difference, over the spread of ``a``; scores alike hardly spread, so 0.1."""
    return float(np.sqrt(np.mean((a - b) ** 2)) / max(a.std(), 0.1))


def make_prompts(rng: np.random.Generator, count: int, length: int, hidden: int) -> Prompts:
    boxes = np.sort(rng.random((count, 2, 2), np.float32), 1).reshape(count, 4)
    text = rng.normal(size=(count, length, hidden)).astype(np.float32)
    valid = np.ones(count, np.float32)
    told = np.arange(length) < rng.integers(1, length + 1, (count, 1))
    return Prompts(boxes, boxes[:, :2].copy(), valid, text, told)


@pytest.mark.parametrize(("count", "length"), [(1, 5), (2, 16), (3, 1), (7, 17), (1, 64)])
def test_segmenter_agrees_with_onnxruntime(
    count: int, length: int, loaded: Bundle, ours: Sessions, theirs: Sessions, half: Sessions
) -> None:
    rng, shapes = np.random.default_rng(count), loaded.manifest.shapes
    pixels = rng.normal(size=(3, *shapes.image_size)).astype(np.float32)
    prompts = make_prompts(rng, count, length, shapes.hidden)
    wanted = theirs.segmenter.decode(theirs.segmenter.encode(pixels), prompts)
    for sessions, most in ((ours, 1e-4), (half, 5e-2)):
        found = sessions.segmenter.decode(sessions.segmenter.encode(pixels), prompts)
        for one, other in zip(wanted, found, strict=True):
            assert one.shape == other.shape
            assert spread(one, other) < most


def test_any_number_of_prompts_falls_into_groups() -> None:
    for count in range(20):
        sizes = openvino_segmenter.groups(count)
        assert sum(sizes) == count and set(sizes) <= set(openvino_segmenter.GROUPS)


def test_steps_are_read_in_fp32_at_every_precision(half: Sessions, theirs: Sessions) -> None:
    assert half.precision == "bf16"
    said = [300 + n for n in range(20)]
    logits = []
    for sessions in (half, theirs):
        context = sessions.mllm.open(200)
        logits.append([context.extend([token]).copy() for token in said])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-3)


@pytest.mark.parametrize("which", ["shipped", "random"])
@pytest.mark.parametrize("length", [64, 100, 384])
def test_steps_and_blocks_on_one_cache_give_the_logits_of_onnxruntime(
    which: str, length: int, bundle: Path
) -> None:
    # Matrices of the shipped one lie on the int8 grid, random ones do not.
    read = Bundle.load(bundle if which == "shipped" else factory.random_bundle(), precision="fp32")
    length = min(length, read.manifest.shapes.max_length)
    rng = np.random.default_rng(length)
    contexts = [
        load_sessions(name, read, threads=1).mllm.open(length) for name in ("openvino", "onnxruntime")
    ]
    assert isinstance(contexts[0], openvino_context.MixedContext)
    blocks = [1, 5, 1, 1, 13, 1, 1]
    for turn in range(2):
        for size in blocks:
            ids = rng.integers(100, read.manifest.shapes.vocabulary // 2, size).tolist()
            ids = [token for token in ids if token != read.tokenizer.image_token] or [100]
            one, other = (context.extend(ids).copy() for context in contexts)
            assert np.abs(one - other).max() < 1e-4 * max(1.0, np.abs(other).max())
        for context in contexts:
            context.truncate(7 + turn)
    # To the last place of the cache, and no further.
    for context in contexts:
        while context.length < context.capacity:
            last = context.extend([101]).copy()
        with pytest.raises(ValueError, match="do not fit"):
            context.extend([101])
        assert np.isfinite(last).all()


def test_conversations_do_not_share_memory(ours: Sessions) -> None:
    said = [310, 320, 330]

    def talk(tokens: list[int]) -> list[np.ndarray]:
        context = ours.mllm.open(64)
        return [context.extend([token]).copy() for token in tokens]

    alone = talk(said)
    first, second = ours.mllm.open(64), ours.mllm.open(64)
    for token, wanted in zip(said, alone, strict=True):
        second.extend([token + 1])
        np.testing.assert_array_equal(first.extend([token]), wanted)
    del first, second
    # Their requests are used again, with other memory.
    for wanted, found in zip(alone, talk(said), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_matrices_on_the_grid_are_held_as_whole_numbers() -> None:
    rng = np.random.default_rng(3)
    on, off = snap(rng.normal(size=(48, 64))), rng.normal(size=(64, 48)).astype(np.float32)
    x = op.parameter([5, 64], np.float32)
    first = op.matmul(x, op.constant(np.ascontiguousarray(on.T)), False, False)
    model = ov.Model([op.matmul(first, op.constant(off), False, True)], [x], "two")
    model.input(0).set_names({"x"})
    model.output(0).set_names({"y"})
    given = rng.normal(size=(5, 64)).astype(np.float32)
    assert openvino_decoder.compress(model) == 1
    held = {
        tuple(node.shape): node.data
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Constant" and node.get_element_type() == ov.Type.i8
    }
    np.testing.assert_array_equal(held[48, 2, 32], fit(on)[0])
    # Left to itself, OpenVINO would quantise the activations of such a product: `compile_model` forbids it.
    compiled = openvino_library.compile_model(ov.Core(), model, Path("two"), 1)
    found = openvino_library.Graph(compiled).run({"x": given})["y"]
    np.testing.assert_allclose(found, given @ on.T @ off.T, rtol=1e-4, atol=1e-4)


def test_pipeline_gives_the_masks_of_onnxruntime(bundle: Path, samples: Path) -> None:
    pipelines = [
        Pipeline.load(bundle, precision="fp32", threads=2, engine=b) for b in ("onnxruntime", "openvino")
    ]
    for number in range(2):
        results = [p.open(samples / f"scene_{number}.png").segment("the small cube") for p in pipelines]
        one, other = results
        assert one.semantic == other.semantic
        assert np.array_equal(one.spatial.locations, other.spatial.locations)
        assert masks.iou(one.mask, other.mask) > 0.99
        assert other.engine["engine"] == "openvino"
        # In bf16 only where it is asked for, or its parity gate passed.
        assert other.engine["precision"] == "fp32"


def test_bf16_needs_a_processor_that_has_it(loaded: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_session, "has_bf16", lambda core: False)
    with pytest.raises(EngineError, match="no bfloat16 instructions"):
        openvino_session.load(loaded, threads=1, precision="bf16")


def test_threads_may_share_the_segmenter(loaded: Bundle, ours: Sessions) -> None:
    rng, size = np.random.default_rng(8), loaded.manifest.shapes.image_size
    images = [rng.normal(size=(3, *size)).astype(np.float32) for _ in range(4)]
    alone = [ours.segmenter.encode(image) for image in images]
    together: dict[int, Any] = {}
    workers = [
        threading.Thread(
            target=lambda n=n, image=image: together.update({n: ours.segmenter.encode(image)})  # type: ignore[misc]
        )
        for n, image in enumerate(images)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for (n, wanted), name in itertools.product(enumerate(alone), alone[0]):
        np.testing.assert_array_equal(together[n][name], wanted[name])


def test_unreadable_graphs_are_one_line(loaded: Bundle, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"OpenVINO .* cannot read .*x.onnx") as caught:
        openvino_library.read(ov.Core(), tmp_path / "x.onnx")
    assert "\n" not in str(caught.value)
    with pytest.raises(BundleError, match=r"cannot read .*image_encoder.onnx") as caught:
        path = loaded.graphs["image_encoder"]
        model = openvino_library.read(ov.Core(), path)
        openvino_library.compile_model(ov.Core(), model, path, 1, shapes={"pixels": [1, 5, 8, 8]})
    assert "\n" not in str(caught.value)
    with pytest.raises(BundleError, match=r"image_encoder.onnx is no decoder"):
        openvino_step.StepGraphs(loaded.graphs["image_encoder"], loaded.manifest.shapes, 1)


def test_a_decoder_with_weights_beside_it_is_stepped_by_onnxruntime(
    loaded: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = {**loaded.graphs, "decoder_weights": loaded.graphs["decoder"]}
    monkeypatch.setattr(openvino_session, "StepGraphs", None)  # not even looked at
    sessions = openvino_session.load(dataclasses.replace(loaded, graphs=graphs), threads=1)
    assert type(sessions.mllm.open(64)) is onnxruntime_context.OnnxContext


def test_segmenters_load_alone(loaded: Bundle, ours: Sessions) -> None:
    pixels = np.random.default_rng().random((3, *loaded.manifest.shapes.image_size), np.float32)
    wanted = ours.segmenter.encode(pixels)
    for engine in (onnxruntime_session, openvino_session):
        found = engine.load_segmenter(loaded, threads=2).encode(pixels)  # type: ignore[attr-defined]
        assert set(found) == set(wanted)
        for name, values in wanted.items():
            np.testing.assert_allclose(found[name], values, atol=1e-4 * np.abs(values).max())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_usual_request_waits_for_no_compiler(
    precision: str, bundle: Path, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "bf16" and not openvino_library.has_bf16(ov.Core()):
        pytest.skip("this processor has no bfloat16 instructions")
    expression = "the small red cube left of the large sphere"
    with Pipeline.load(bundle, engine="openvino", precision=precision, threads=1) as pipeline:

        def forbidden(*_: object, **__: object) -> None:
            raise AssertionError("a graph is compiled while somebody waits")

        for module in (openvino_segmenter, openvino_step, openvino_block, openvino_tower):
            monkeypatch.setattr(module, "compile_model", forbidden)
        picture = samples / "scene_0.png"
        pipeline.open(picture).segment(expression, boxes=[10, 10, 60, 60])
        pipeline.open(picture).segment(expression)


def test_the_step_of_longer_conversations_is_compiled_after_the_second(loaded: Bundle) -> None:
    sessions = load_sessions("openvino", loaded, threads=1)
    mllm = sessions.mllm
    assert isinstance(mllm, openvino_session.MixedMLLM)
    steps = mllm._conversations._steps
    usual = openvino_session._usual_length(loaded)
    for graphs in (1, 2, 2):
        context = mllm.open(usual)
        assert len(steps._compiled) == graphs
        longer = context.capacity + 1
        del context
    mllm.open(longer)
    assert len(steps._compiled) == 2


def test_what_could_not_be_made_is_tried_again() -> None:
    tried = list[int]()

    def make(key: int) -> int:
        tried.append(key)
        if key < 0:
            raise BundleError(f"no {key}")
        return key * key

    orders = openvino_library.Orders(make)
    assert [orders.order(key).result() for key in (3, 4, 3)] == [9, 16, 9]
    for _ in range(2):
        with pytest.raises(BundleError, match="no -1"):
            orders.order(-1).result()
    assert tried == [3, 4, -1, -1]


def test_the_graph_for_many_prompts_is_compiled_after_the_second_call(loaded: Bundle) -> None:
    segmenter = openvino_session.load_segmenter(loaded, threads=1, precision="fp32")
    shapes, rng = loaded.manifest.shapes, np.random.default_rng()
    features = segmenter.encode(rng.random((3, *shapes.image_size), np.float32))
    many, length = openvino_segmenter.GROUPS[0], 3
    held = list[int]()
    for _ in range(3):
        held.append(len(segmenter._graphs))
        segmenter.decode(features, make_prompts(rng, 1, length, shapes.hidden))
    assert held == [1, 1, 2]
    ready = segmenter._graph(many, length)
    assert len(segmenter._graphs) == 2
    prompts = make_prompts(rng, many, length, shapes.hidden)
    logits, scores = segmenter.decode(features, prompts)
    assert ready.done()
    for row in range(many):
        one = Prompts(*(array[row : row + 1] for array in vars(prompts).values()))
        alone, score = segmenter.decode(features, one)
        assert spread(alone[0], logits[row]) < 1e-4
        np.testing.assert_allclose(score[0], scores[row], atol=1e-4)
