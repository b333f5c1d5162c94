"""Prompts as text and as tokens: round trips, refusals, and that no text can speak for the conversation."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from ppcr.errors import BundleError, ExpressionError
from ppcr.prompts import (
    LOCATION_BINS,
    MAX_TARGETS,
    SPECIAL_TOKENS,
    Conversation,
    SemanticPrompt,
    SpatialPrompt,
    clean_expression,
    location_token,
)
from ppcr.tokenizer import PromptTokenizer
from tests import factory

words = st.lists(st.sampled_from(["red", "not blue", "large", "left of", "sphere"]), min_size=1, max_size=4)
fields = words.map(" ".join)
prompts = st.builds(
    SemanticPrompt, fields, fields | st.just(""), fields | st.just(""), st.integers(0, MAX_TARGETS)
)
locations = st.lists(st.integers(0, LOCATION_BINS - 1), min_size=6, max_size=6)
units = st.floats(0, 1, width=32)


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return factory.tokenizer()


@given(prompts)
def test_semantic_text_reads_back(prompt: SemanticPrompt) -> None:
    assert SemanticPrompt.parse(prompt.text) == prompt
    assert prompt.is_none == prompt.text.endswith("none")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "sphere; red metal; left of green cube; one",
            SemanticPrompt("sphere", "red metal", "left of green cube"),
        ),
        ("  Sphere ;RED;-; 2 ", SemanticPrompt("sphere", "red", "", 2)),
        ("; any; leftmost; none", SemanticPrompt("object", "", "leftmost", 0)),
        ("cube; any; any; 0", SemanticPrompt("cube", count=0)),
    ],
)
def test_semantic_text_may_be_written_loosely(text: str, expected: SemanticPrompt) -> None:
    assert SemanticPrompt.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "sphere",
        "a; b; c",
        "a; b; c; d",
        "a; b; c; 7",
        "a; b; c; -1",
        "a; b; c; 1; 2",
        "a;b;c;",
        "x" * 2000,
    ],
)
def test_other_semantic_text_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        SemanticPrompt.parse(text)
    assert caught.value.exit_code == 4 and len(str(caught.value)) < 400


@pytest.mark.parametrize("field", ["category", "attributes", "relation"])
def test_fields_cannot_hold_the_separator(field: str) -> None:
    wrong: dict[str, Any] = {field: "red; metal"}
    with pytest.raises(ExpressionError, match=";"):
        replace(SemanticPrompt("cube"), **wrong)


@pytest.mark.parametrize("count", [-1, MAX_TARGETS + 1])
def test_count_has_bounds(count: int) -> None:
    with pytest.raises(ExpressionError, match=str(count)):
        SemanticPrompt("cube", count=count)


@given(st.lists(locations, max_size=4))
def test_locations_read_back_with_corners_in_order(rows: list[list[int]]) -> None:
    given_rows = np.asarray(rows, np.int64).reshape(-1, 6)
    spatial = SpatialPrompt.from_locations(given_rows.reshape(-1))
    assert spatial.count == len(rows)
    assert (spatial.boxes[:, :2] <= spatial.boxes[:, 2:]).all()
    expected = np.concatenate(
        [
            given_rows[:, :2],
            np.minimum(given_rows[:, 2:4], given_rows[:, 4:]),
            np.maximum(given_rows[:, 2:4], given_rows[:, 4:]),
        ],
        axis=1,
    )
    np.testing.assert_array_equal(spatial.locations, expected)
    np.testing.assert_array_equal(SpatialPrompt.from_locations(spatial.locations).boxes, spatial.boxes)


@pytest.mark.parametrize("shift", [0.0, 0.004, 0.2])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_object_told_again_is_left_out(count: int, shift: float) -> None:
    """Boxes of a tenth of the image, side by side; the first one once more, moved by a part of itself."""
    rng = np.random.default_rng([count, int(shift * 1000)])
    low = np.stack([np.arange(count) / 8, rng.random(count) / 2], axis=1).astype(np.float32)
    boxes = np.concatenate([low, low + np.float32(0.1)], axis=1)
    told = SpatialPrompt(
        np.concatenate([boxes, boxes[:1] + np.float32(shift * 0.1)]), np.zeros((count + 1, 2))
    )
    found = told.distinct()
    kept = count if shift < 0.05 else count + 1
    np.testing.assert_array_equal(found.boxes, told.boxes[:kept])
    assert len(found.points) == kept
    assert SpatialPrompt.empty().distinct().count == 0


@given(st.lists(st.tuples(units, units, units, units, units, units), min_size=1, max_size=3))
def test_locations_are_within_half_a_bin(rows: list[tuple[float, ...]]) -> None:
    values = np.asarray(rows, np.float32)
    spatial = SpatialPrompt(values[:, 2:], values[:, :2])
    centres = (spatial.locations + 0.5) / LOCATION_BINS
    # The value 1 belongs to the last bin, whose centre is half a bin away as well.
    assert np.abs(centres - values).max() <= 0.5 / LOCATION_BINS + 1e-6
    assert spatial.text.count("<|loc_") == 6 * len(rows)


@given(st.text(max_size=60))
def test_clean_expression_is_one_printable_line(text: str) -> None:
    try:
        clean = clean_expression(text)
    except ExpressionError:
        assert not any(c.isalnum() for c in unicodedata.normalize("NFC", text))
        return
    assert clean_expression(clean) == clean
    assert clean == " ".join(clean.split()) and "<|" not in clean
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in clean)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The RED\tcube\n", "the red cube"),
        ("a\x00b\x1b[31mc", "a b [31mc"),
        ("cafe\u0301", "caf\u00e9"),
        ("the \U0001f534 ball", "the \U0001f534 ball"),
        ("\u05d4\u05e7\u05d5\u05d1\u05d9\u05d4", "\u05d4\u05e7\u05d5\u05d1\u05d9\u05d4"),
        ("bad \udcff bytes", "bad bytes"),
    ],
)
def test_clean_expression_examples(text: str, expected: str) -> None:
    assert clean_expression(text) == expected


@pytest.mark.parametrize("text", ["", " \n\t", "\x00\x07", "\udcff"])
def test_empty_expressions_are_refused(text: str) -> None:
    with pytest.raises(ExpressionError, match="empty"):
        clean_expression(text)


def test_long_expressions_are_refused(tokenizer: PromptTokenizer) -> None:
    with pytest.raises(ExpressionError, match="10000 characters"):
        clean_expression("x" * 10_000)
    with pytest.raises(ExpressionError, match="tokens"):
        tokenizer.expression("\U0001f534" * 100)


@given(st.text(max_size=40), st.sampled_from([*SPECIAL_TOKENS, location_token(7)]))
def test_no_expression_holds_a_special_token(text: str, special: str) -> None:
    tokenizer = factory.tokenizer()
    ids = tokenizer.expression(f"a {text}{special.upper()} b {special}", max_tokens=10_000)
    expression = ids[: len(ids) - len(tokenizer.after_expression)]
    reserved = {tokenizer.tokenizer.token_to_id(t) for t in SPECIAL_TOKENS}
    assert not [i for i in expression if i in reserved or i >= tokenizer.first_location]


@given(st.text(max_size=40))
def test_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = factory.tokenizer()
    normal = unicodedata.normalize("NFC", text.encode("utf-8", "ignore").decode())
    assert tokenizer.decode(tokenizer.encode(normal)) == normal


@given(prompts)
def test_semantic_prompts_survive_the_tokenizer(prompt: SemanticPrompt) -> None:
    tokenizer = factory.tokenizer()
    assert tokenizer.semantic(tokenizer.encode(prompt.text)) == prompt


@given(st.data())
def test_every_constrained_answer_is_a_semantic_prompt(data: st.DataObject) -> None:
    tokenizer = factory.tokenizer()
    cursor, ids = tokenizer.semantic_constraint.start(), []
    while not cursor.done:
        token = data.draw(st.sampled_from(cursor.allowed().tolist()))
        cursor.advance(token)
        ids.append(token)
    prompt = tokenizer.semantic(ids)
    assert SemanticPrompt.parse(prompt.text) == prompt
    assert re.fullmatch(tokenizer.semantic_constraint.regex(tokenizer.decode), tokenizer.decode(ids))


def test_free_fields_leave_out_what_would_break_the_format(tokenizer: PromptTokenizer) -> None:
    texts = [tokenizer.decode([i]) for i in tokenizer.text_tokens]
    assert not [t for t in texts if ";" in t or "<" in t or any(ord(c) < 32 for c in t)]
    assert " red" in texts and "left" in "".join(texts)


@pytest.mark.parametrize("step", [1, 2, 8, 1000])
def test_answers_are_no_finer_than_the_location_step(tokenizer: PromptTokenizer, step: int) -> None:
    coarse = PromptTokenizer(tokenizer.tokenizer, location_step=step)
    allowed = coarse.spatial_constraint(1).start().allowed() - coarse.first_location
    assert len(allowed) == 1000 // step and allowed[0] == step // 2
    assert set(np.diff(allowed)) <= {step}
    # Every place lies within half a step of one that can be said.
    places = np.arange(1000)
    assert np.abs(places[:, None] - allowed).min(1).max() <= step // 2
    # What a user gives or training shows may be finer.
    fine = SpatialPrompt.from_locations([1, 2, 3, 4, 5, 6])
    assert coarse.spatial(coarse.spatial_ids(fine)).text == fine.text


@pytest.mark.parametrize("step", [0, -3, 1001])
def test_impossible_location_steps_are_refused(tokenizer: PromptTokenizer, step: int) -> None:
    with pytest.raises(BundleError, match="location_step"):
        PromptTokenizer(tokenizer.tokenizer, location_step=step)


@given(st.lists(locations, min_size=1, max_size=3))
def test_spatial_prompts_survive_the_tokenizer(rows: list[list[int]]) -> None:
    tokenizer = factory.tokenizer()
    spatial = SpatialPrompt.from_locations(np.asarray(rows).reshape(-1))
    ids = tokenizer.encode(spatial.text)
    assert ids == tokenizer.spatial_ids(spatial)
    cursor = tokenizer.spatial_constraint(spatial.count).start()
    for token in ids:
        cursor.advance(token)
    assert cursor.done
    np.testing.assert_array_equal(tokenizer.spatial(ids).boxes, spatial.boxes)


def test_conversation_is_the_same_in_pieces_and_as_a_whole(tokenizer: PromptTokenizer) -> None:
    talk = tokenizer.conversation
    pieces = tokenizer.prefix(4) + tokenizer.expression("the red cube")
    whole = f"{talk.before_image}{'<|image_pad|>' * 4}{talk.after_image}the red cube{talk.after_expression}"
    assert pieces == tokenizer.encode(whole)
    assert pieces.count(tokenizer.image_token) == 4


def test_ruler_marks_are_evenly_spaced() -> None:
    marks = [int(n) for n in re.findall(r"loc_(\d{3})", Conversation(ruler=4).before_image)]
    assert marks == [125, 375, 625, 875]


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(BundleError, match="loc_000"):
        PromptTokenizer(Tokenizer(models.BPE()))
