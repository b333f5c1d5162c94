"""The pipeline on random weights: caches change nothing but the time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ppcr import images, masks
from ppcr.errors import EngineError, ExpressionError, ImageError, UsageError
from ppcr.prompts import SemanticPrompt
from runtime import Pipeline, Result
from runtime.bundle import Bundle
from runtime.onnxruntime_branches import OnnxBranches
from runtime.onnxruntime_context import OnnxContext
from runtime.prompter import SIDE_BY_SIDE
from runtime.session import BACKENDS, load_sessions
from runtime.timing import STAGES
from tests import factory
from tests.scripted import assert_same, places, scripted

ONE, TWO, THREE = "the red cube", "large metal sphere left of the gray cube", "green"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(factory.random_bundle())


@pytest.fixture(scope="module", params=[1, 2], ids=["one_thread", "two_threads"])
def pipeline(request: pytest.FixtureRequest) -> Any:
    with Pipeline.load(factory.random_bundle(), threads=request.param, engine="onnxruntime") as made:
        yield made


@pytest.fixture(scope="module")
def plain() -> Any:
    with Pipeline.load(factory.random_bundle(), threads=1, engine="onnxruntime") as made:
        yield made


def test_two_turns_on_one_cache_equal_recomputing_from_scratch(pipeline: Pipeline) -> None:
    result = pipeline.open(factory.picture(1)).segment(ONE)
    assert not result.is_none
    bundle, sessions = pipeline.bundle, pipeline.sessions
    tokenizer, config = bundle.tokenizer, bundle.config.mllm
    small = images.normalise(images.resize(factory.picture(1), config.image_size), config.mean, config.std)
    features = sessions.mllm.encode_image(images.patchify(small, config.patch, config.merge, config.temporal))
    read = tokenizer.prefix(config.image_tokens) + tokenizer.expression(ONE)
    for constraint, told in (
        (tokenizer.semantic_constraint, tokenizer.between_stages),
        (tokenizer.spatial_constraint(result.semantic.count), []),
    ):
        cursor, answer = constraint.start(), list[int]()
        while not cursor.done:
            allowed = cursor.allowed()
            # A new cache for every token: nothing is reused, no run of tokens is treated specially.
            logits = sessions.mllm.open().extend([*read, *answer], features)
            answer.append(int(allowed[logits[allowed].argmax()]))
            cursor.advance(answer[-1])
        read += [*answer, *told]
    answer_count = 6 * result.semantic.count
    np.testing.assert_array_equal(tokenizer.spatial(read[-answer_count:]).locations, result.spatial.locations)


def test_second_expression_equals_a_fresh_scene_and_reuses_the_image(pipeline: Pipeline) -> None:
    scene = pipeline.open(factory.picture(2))
    first, second, again = scene.segment(ONE), scene.segment(TWO), scene.segment(ONE)
    assert_same(second, pipeline.open(factory.picture(2)).segment(TWO))
    assert_same(again, first)
    image = len(pipeline.bundle.tokenizer.prefix(64)) - len(pipeline.bundle.tokenizer.before_image)
    assert second.costs.reused_tokens >= first.costs.reused_tokens + image
    assert {"image", "vision", "encoder"} <= set(first.timings)
    assert not {"image", "vision", "encoder"} & set(second.timings)


def test_scenes_may_be_open_at_once(pipeline: Pipeline) -> None:
    pictures = [factory.picture(seed) for seed in (3, 4)]
    left, right = (pipeline.open(picture) for picture in pictures)
    mixed = [left.segment(ONE), right.segment(TWO), left.segment(TWO), right.segment(ONE)]
    for result, picture, expression in zip(
        mixed, (pictures[0], pictures[1]) * 2, (ONE, TWO, TWO, ONE), strict=True
    ):
        assert_same(result, pipeline.open(picture).segment(expression))


def test_many_expressions_equal_one_at_a_time(pipeline: Pipeline) -> None:
    scene = pipeline.open(factory.picture(5))
    expressions = [ONE, TWO, THREE]
    together = scene.segment_many(expressions)
    assert [result.expression for result in together] == expressions
    for result, expression in zip(together, expressions, strict=True):
        assert_same(result, pipeline.open(factory.picture(5)).segment(expression))


PHRASES = [
    f"{many} {size} {color} {shape}{where}"
    for many in ("the", "all")
    for size in ("small", "large metal")
    for color, shape in (("red", "cube"), ("green", "sphere"), ("blue", "cone"))
    for where in ("", " left of the gray cube", " that is not yellow")
]


@pytest.mark.parametrize("count", [2, 5, 16, 33])
def test_any_number_of_expressions_equals_one_at_a_time(pipeline: Pipeline, count: int) -> None:
    rng = np.random.default_rng(count)
    asked = [str(text) for text in rng.choice([*PHRASES, "green"], count)]
    asked[-1] = asked[0]  # the same one twice
    scene, calls = pipeline.open(factory.picture(count)), list[int]()
    alone = pipeline.open(factory.picture(count))
    wanted = {text: alone.segment(text) for text in dict.fromkeys(asked)}
    for first in (True, False):  # on a scene that has not read its image, and on one that has
        together = scene.segment_many(asked)
        assert [result.expression for result in together] == asked
        for result in together:
            assert_same(result, wanted[result.expression])
            assert ("vision" in result.timings) == (first and result is together[0])
        calls.append(sum(result.costs.forward_calls for result in together))
    assert calls[0] == calls[1] + 1  # the image is read once
    assert_same(scene.segment(asked[1]), wanted[asked[1]])


def test_expressions_share_forward_calls(plain: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[list[int]] = []
    original = OnnxBranches.extend

    def noted(self: OnnxBranches, parts: Any, guesses: Any = None) -> Any:
        blocks.append(list(parts))
        return original(self, parts, guesses)

    monkeypatch.setattr(OnnxBranches, "extend", noted)
    results = plain.open(factory.picture(8)).segment_many(PHRASES[: SIDE_BY_SIDE + 3])
    assert len(blocks[0]) == SIDE_BY_SIDE
    groups = [results[:SIDE_BY_SIDE], results[SIDE_BY_SIDE:]]
    longest = [max(result.costs.forward_calls for result in group) for group in groups]
    assert len(blocks) <= sum(longest) <= len(blocks) + 1  # the first read the image, too


def test_engines_that_read_one_at_a_time_are_asked_so(
    plain: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plain.open(factory.picture(8)).segment_many(PHRASES[:3])
    monkeypatch.setattr(OnnxContext, "can_branch", False)
    monkeypatch.delattr(OnnxContext, "branch")
    for result, before in zip(plain.open(factory.picture(8)).segment_many(PHRASES[:3]), wanted, strict=True):
        assert_same(result, before)


def test_threads_may_share_a_pipeline_and_a_scene(pipeline: Pipeline) -> None:
    expected = {text: pipeline.open(factory.picture(6)).segment(text) for text in (ONE, TWO)}
    shared = pipeline.open(factory.picture(6))
    start = threading.Barrier(4)

    def work(index: int) -> tuple[str, Result]:
        text = (ONE, TWO)[index % 2]
        scene = shared if index < 2 else pipeline.open(factory.picture(6))
        start.wait()
        return text, scene.segment(text)

    with ThreadPoolExecutor(4) as pool:
        for text, result in pool.map(work, range(4)):
            assert_same(result, expected[text])


def test_masks_of_several_expressions_are_one_batch(bundle: Bundle) -> None:
    pipeline, mllm, segmenter = scripted(
        bundle,
        "cube; red; any; two", places(*range(10, 22)),
        "cube; red; any; none",
        "sphere; large blue metal; any; one", places(*range(30, 36)),
    )  # fmt: skip
    results = pipeline.open(factory.picture()).segment_many([ONE, TWO, THREE])
    assert [len(result.instances) for result in results] == [2, 0, 1]
    assert segmenter.encoded == 1 and mllm.images == 1 and mllm.answers == []
    (batch,) = segmenter.batches
    assert batch.boxes.shape == (3, 4) and batch.spatial_valid.tolist() == [1, 1, 1]
    lengths = [len(bundle.tokenizer.encode(results[i].semantic.text)) for i in (0, 0, 2)]
    assert batch.text_mask.sum(axis=1).tolist() == lengths
    for row, length in enumerate(lengths):
        ids = bundle.tokenizer.encode(results[0 if row < 2 else 2].semantic.text)
        np.testing.assert_array_equal(batch.text_embeddings[row, :length], bundle.embedding[ids])
    # linspace over the batch: the second and third score belong where the second and third box do
    assert results[0].scores.tolist() == [0.0, 0.5] and results[2].scores.tolist() == [1.0]


def test_an_object_told_again_is_drawn_once(bundle: Bundle) -> None:
    told = places(500, 500, 400, 400, 600, 600), places(501, 500, 400, 401, 600, 600), places(*range(6))
    pipeline, _, segmenter = scripted(bundle, "cube; red; any; three", "".join(told))
    result = pipeline.open(factory.picture()).segment(ONE)
    assert result.semantic.count == 3 and len(result.instances) == len(result.boxes) == 2
    assert [len(batch.boxes) for batch in segmenter.batches] == [2]


@pytest.mark.parametrize("threads", [1, 2])
def test_none_stops_early(bundle: Bundle, threads: int) -> None:
    pipeline, mllm, segmenter = scripted(bundle, "cube; red; any; none", threads=threads)
    with pipeline:
        result = pipeline.open(factory.picture()).segment(ONE)
    assert result.is_none and result.semantic == SemanticPrompt("cube", "red", "", 0)
    assert result.boxes.shape == (0, 4) and result.instances.shape == (0, 120, 160) and not result.mask.any()
    assert mllm.answers == [] and segmenter.batches == []
    assert segmenter.encoded == (0 if threads == 1 else 1)
    assert set(result.timings) == {"image", "vision", "semantic", "total"}
    written = result.to_json()
    assert written["none"] is True and written["masks"] == [] and written["spatial"]["boxes"] == []
    assert not masks.decode_rle(written["union"]).any()


def test_a_bad_expression_spoils_no_batch(bundle: Bundle) -> None:
    pipeline, mllm, _ = scripted(bundle)
    with pytest.raises(ExpressionError):
        pipeline.open(factory.picture()).segment_many([ONE, "  "])
    assert mllm.images == 0


def test_a_failure_inside_a_turn_leaves_the_scene_usable(
    plain: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = plain.open(factory.picture(9)).segment(ONE)
    scene = plain.open(factory.picture(9))
    for after in (0, 1, 20):
        calls = iter(range(after))
        original = type(plain.sessions.mllm.open()).extend

        def interrupted(context: Any, *given: Any, calls: Any = calls, original: Any = original) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return original(context, *given)

        with monkeypatch.context() as patch:
            patch.setattr(type(plain.sessions.mllm.open()), "extend", interrupted)
            with pytest.raises(KeyboardInterrupt):
                scene.segment(ONE)
    assert_same(scene.segment(ONE), expected)


def test_a_longer_expression_gets_a_longer_cache(plain: Pipeline) -> None:
    long = " left of the red cube".join(["the green sphere"] * 12)
    scene = plain.open(factory.picture(13))
    short = scene.segment(ONE)
    assert_same(scene.segment(long), plain.open(factory.picture(13)).segment(long))
    assert_same(scene.segment(ONE), short)


def test_a_prefix_is_copied_as_it_was_computed(bundle: Bundle) -> None:
    mllm = load_sessions("onnxruntime", bundle, threads=1).mllm
    prefix, rest = bundle.tokenizer.before_image, bundle.tokenizer.encode("the red cube")
    first, second = mllm.open(prefix=prefix), mllm.open(prefix=prefix)
    assert first.length == second.length == len(prefix)
    whole = mllm.open().extend([*prefix, *rest]).copy()
    for context in (first, second):
        np.testing.assert_allclose(context.extend(rest), whole, rtol=1e-4, atol=1e-4)
    # What one conversation goes on to say does not reach the next.
    third = mllm.open(prefix=prefix)
    np.testing.assert_allclose(third.extend(rest), whole, rtol=1e-4, atol=1e-4)


def test_contexts_have_bounds(bundle: Bundle) -> None:
    mllm = load_sessions("onnxruntime", bundle, threads=1).mllm
    context = mllm.open(10)
    assert context.length == 0 and context.capacity >= 10
    for wrong in (lambda: mllm.open(0), lambda: mllm.open(385), lambda: context.truncate(1)):
        with pytest.raises(ValueError):
            wrong()
    context.extend([5, 6, 7])
    with pytest.raises(ValueError, match="image tokens"):
        context.extend([bundle.tokenizer.image_token])
    with pytest.raises(ValueError, match="do not fit"):
        context.extend([5] * 400)
    with pytest.raises(ValueError, match="do not fit"):
        context.extend([])
    assert context.length == 3
    context.truncate(1)
    assert context.length == 1


@pytest.mark.parametrize("kind", ["path", "pillow", "array"])
def test_images_come_in_several_forms(plain: Pipeline, tmp_path: Path, kind: str) -> None:
    array = factory.picture(10)
    path = tmp_path / "scene.png"
    Image.fromarray(array).save(path)
    source: Any = {"path": path, "pillow": Image.fromarray(array), "array": array}[kind]
    assert_same(plain.open(source).segment(ONE), plain.open(array).segment(ONE))


def test_odd_sizes(plain: Pipeline) -> None:
    for height, width in ((1, 1), (1, 300), (257, 3)):
        result = plain.open(factory.picture(11, height, width)).segment(ONE)
        assert result.instances.shape[1:] == (height, width)
        assert (result.boxes >= 0).all() and (result.boxes <= [width, height] * 2).all()


def test_a_bad_image_is_refused(plain: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        plain.open(tmp_path / "nothing.png")


def test_result_as_json_holds_everything(plain: Pipeline) -> None:
    result = plain.open(factory.picture(12)).segment(ONE)
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert written["semantic"]["text"] == result.semantic.text
    assert (
        len(written["masks"])
        == len(written["scores"])
        == len(written["spatial"]["boxes"])
        == len(result.instances)
    )
    for rle, mask in zip(written["masks"], result.instances, strict=True):
        np.testing.assert_array_equal(masks.decode_rle(rle), mask)
    np.testing.assert_array_equal(masks.decode_rle(written["union"]), result.mask)
    stages = written["timings"]["stages"]
    assert set(stages) <= {*STAGES, "total"} and stages["total"]["wall_s"] > 0
    assert written["timings"]["forward_calls"] == result.costs.forward_calls > 0
    assert written["image"] == {"height": 120, "width": 160}


def test_saving_replaces_an_earlier_result_and_nothing_else(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    pipeline, _, _ = scripted(bundle, "cube; red; any; none")
    scene = pipeline.open(factory.picture())
    three = scene.segment(ONE, boxes=[[0, 0, 50, 50]] * 3, semantic="cube; any; any; 3")
    assert three.save(folder) == folder / "overlay.png"
    (folder / "notes.txt").write_text("mine")
    (folder / "mask_old.png").write_text("mine too")
    names = {"overlay.png", "result.json", "notes.txt", "mask_old.png"}
    assert {p.name for p in folder.iterdir()} == names | {"mask_0.png", "mask_1.png", "mask_2.png"}
    saved = np.asarray(Image.open(folder / "mask_1.png"))
    np.testing.assert_array_equal(saved > 0, three.instances[1])
    scene.segment(ONE).save(folder)
    assert {p.name for p in folder.iterdir()} == names
    assert json.loads((folder / "result.json").read_text())["none"] is True


def test_unknown_engines_and_thread_counts_are_refused(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="onnxruntime"):
        load_sessions("abacus", bundle, threads=1)
    with pytest.raises(UsageError, match="threads"):
        Pipeline.load(factory.random_bundle(), threads=0)
    monkeypatch.setitem(BACKENDS, "absent", "runtime.no_such_module_session")
    with pytest.raises(EngineError, match="absent"):
        load_sessions("absent", bundle, threads=1)


def test_a_mask_from_a_cold_start_loads_no_torch(tmp_path: Path) -> None:
    Image.fromarray(factory.picture()).save(tmp_path / "scene.png")
    code = (
        "import sys, runtime\nassert 'runtime.pipeline' not in sys.modules\n"
        f"pipe = runtime.Pipeline.load({str(factory.random_bundle())!r})\n"
        f"result = pipe.open({str(tmp_path / 'scene.png')!r}).segment('the red cube', boxes=[1, 1, 90, 90])\n"
        "assert result.instances.shape == (1, 120, 160)\n"
        "print(*[name for name in ('torch', 'transformers', 'onnx') if name in sys.modules])"
    )
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
