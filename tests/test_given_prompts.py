"""Every stage's output can be given instead of computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ppcr.errors import BoxError, ExpressionError
from ppcr.prompts import SemanticPrompt
from runtime import Pipeline
from runtime.bundle import Bundle
from runtime.session import Sessions
from tests import factory
from tests.scripted import ScriptedMLLM, assert_same, places, scripted

ONE, TWO = "the red cube", "large metal sphere left of the gray cube"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.load(factory.random_bundle())


@pytest.fixture(scope="module")
def plain() -> Any:
    with Pipeline.load(factory.random_bundle(), threads=1, engine="onnxruntime") as made:
        yield made


def test_given_boxes_replace_stage_two(bundle: Bundle) -> None:
    pipeline, mllm, segmenter = scripted(bundle, "cube; red; any; none")
    result = pipeline.open(factory.picture()).segment(ONE, boxes=[[16, 12, 80, 60], [0, 0, 160, 120]])
    assert result.given == ("boxes",) and "spatial" not in result.timings
    assert result.semantic == SemanticPrompt("cube", "red", "", 2)
    np.testing.assert_allclose(
        segmenter.batches[0].boxes, [[0.1, 0.1, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0]], atol=1e-6
    )
    np.testing.assert_allclose(segmenter.batches[0].points, [[0.3, 0.3], [0.5, 0.5]], atol=1e-6)
    np.testing.assert_allclose(result.boxes, [[16, 12, 80, 60], [0, 0, 160, 120]], atol=1e-3)


def test_given_semantic_prompt_replaces_stage_one(bundle: Bundle) -> None:
    pipeline, mllm, _ = scripted(bundle, places(100, 200, 50, 150, 150, 250))
    result = pipeline.open(factory.picture()).segment(ONE, semantic="Cube; red; -; 1")
    tokenizer = bundle.tokenizer
    assert result.given == ("semantic",) and result.semantic.text == "cube; red; any; one"
    written = tokenizer.expression(ONE) + tokenizer.encode("cube; red; any; one") + tokenizer.between_stages
    assert mllm.read[:-5] == tokenizer.prefix(64) + written
    assert result.spatial.locations.tolist() == [[100, 200, 50, 150, 150, 250]]
    assert result.costs.tokens == 6 and result.costs.forward_calls == 6


def test_both_given_need_no_language_model(bundle: Bundle) -> None:
    pipeline, mllm, _ = scripted(bundle)
    result = pipeline.open(factory.picture()).segment(
        ONE, semantic="cube; red; any; one", boxes=[1, 2, 30, 40]
    )
    assert mllm.images == 0 and mllm.read == [] and result.costs.forward_calls == 0
    assert result.given == ("semantic", "boxes") and len(result.instances) == 1


def test_given_none_needs_no_model_at_all(bundle: Bundle) -> None:
    pipeline, mllm, segmenter = scripted(bundle)
    result = pipeline.open(factory.picture()).segment(ONE, semantic="cube; red; any; none")
    assert result.is_none and mllm.images == 0 and segmenter.encoded == 0


def test_giving_what_was_computed_changes_nothing(plain: Pipeline) -> None:
    mllm = ScriptedMLLM(plain.bundle, [])
    answers = ["cube; red; any; two", places(300, 400, 200, 300, 400, 500, 700, 600, 600, 500, 800, 700)]
    mllm.answers += [i for answer in answers for i in plain.bundle.tokenizer.encode(answer)]
    sessions = Sessions(mllm, plain.sessions.segmenter)
    scene = Pipeline(plain.bundle, sessions, threads=1, engine="fake").open(factory.picture(7))
    computed = scene.segment(TWO)
    given = scene.segment(TWO, semantic=computed.semantic, boxes=computed.boxes)
    assert_same(given, computed)


def test_the_segmenter_reads_the_semantic_prompt(plain: Pipeline) -> None:
    scene = plain.open(factory.picture(8))
    one, other = (
        scene.segment(ONE, semantic=f"{text}; one", boxes=[10, 10, 90, 90])
        for text in ("cube; red; any", "sphere; large metal; left of gray cube")
    )
    assert not np.array_equal(one.scores, other.scores)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"boxes": [[0, 0, 161, 100]]}, BoxError),
        ({"boxes": [[-1, 0, 10, 10]]}, BoxError),
        ({"boxes": [[10, 10, 5, 20]]}, BoxError),
        ({"boxes": [[1, 2, 3]]}, BoxError),
        ({"boxes": []}, BoxError),
        ({"boxes": [[1, 2, 3, 4], [5, 6]]}, BoxError),
        ({"boxes": ["a", "b"]}, BoxError),
        ({"boxes": [[np.nan, 0, 10, 10]]}, BoxError),
        ({"boxes": np.tile([0, 0, 10, 10], (65, 1))}, BoxError),
        ({"semantic": "a cube"}, ExpressionError),
        ({"semantic": f"{'red blue green ' * 30}; any; any; one"}, ExpressionError),
        ({"semantic": "cube; any; any; none", "boxes": [0, 0, 10, 10]}, ExpressionError),
    ],
)
def test_what_cannot_be_given_is_refused_before_anything_runs(
    bundle: Bundle, given: dict[str, Any], error: type[Exception]
) -> None:
    pipeline, mllm, segmenter = scripted(bundle)
    with pytest.raises(error):
        pipeline.open(factory.picture()).segment(ONE, **given)
    assert mllm.images == 0 and segmenter.encoded == 0
