"""Expressions against an independent reading of their queries: no margins, no bit sets, on a shaken scene."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ppcr.data.expressions import AMBIGUOUS, MIX, Expression, Phrase, Query, resolve, sample_expressions
from ppcr.data.grammar import ADJECTIVES, NOUNS, Dice, express
from ppcr.data.graph import (
    COLORS,
    HELD_OUT_PAIRS,
    MATERIALS,
    SHAPES,
    SIZES,
    SPLITS,
    SceneGraph,
    Split,
    sample_scene,
)
from ppcr.data.scenes import main, scene_example, scene_examples
from ppcr.errors import OutputError, UsageError
from ppcr.prompts import SemanticPrompt

Sample = tuple[SceneGraph, Expression]
PER_SCENE = 8
CORPUS_SCENES = 1500


def sampled(split: Split, scenes: int, level: int = 2) -> list[Sample]:
    pairs: list[Sample] = []
    for index in range(scenes):
        graph = sample_scene(split, index)
        rng = np.random.default_rng(index)
        pairs += [(graph, expression) for expression in sample_expressions(graph, PER_SCENE, rng, level)]
    return pairs


@pytest.fixture(scope="module")
def corpus() -> list[Sample]:
    return sampled("train", CORPUS_SCENES)


def phrases(phrase: Phrase) -> Iterator[Phrase]:
    """A phrase and everything it refers to."""
    yield phrase
    for landmark in phrase.landmarks:
        yield from phrases(landmark)


def has(graph: SceneGraph, index: int, word: str) -> bool:
    words = graph.describe(index)
    return word[4:] not in words if word.startswith("not ") else word in words


def read(graph: SceneGraph, phrase: Phrase) -> set[int]:
    """What a phrase means when every comparison is decided at once, however close it is."""
    named = [word for word in (phrase.shape, phrase.size, phrase.color, phrase.material) if word]
    fits = {i for i in range(len(graph)) if all(has(graph, i, word) for word in named)}
    x, y = graph.center.T.astype(float)
    name = phrase.relation
    if not name or not fits:
        return fits
    if not phrase.landmarks:
        keys = {
            "left": x, "right": -x, "top": y, "bottom": -y,
            "leftmost": x, "rightmost": -x, "topmost": y, "bottommost": -y,
            "nearest": graph.depth, "farthest": -graph.depth,
            "largest": -graph.radius, "smallest": graph.radius,
        }  # fmt: skip
        rank, _, side = name.rpartition(" from ")
        order = sorted(fits, key=lambda i: keys[side][i])
        place = ("", "second", "third", "fourth").index(rank)
        return set(order[place : place + 1])
    anchors: list[int] = []
    for landmark in phrase.landmarks:
        found = read(graph, landmark)
        assert len(found) <= 1, f"the landmark {landmark} is not unique"
        anchors += found
    if len(anchors) < len(phrase.landmarks):
        return set()
    fits -= set(anchors)
    a = anchors[0]
    far = {i: math.dist(graph.center[i], graph.center[a]) for i in fits}
    if name == "nearest to":
        return {min(far, key=far.__getitem__)} if far else set()
    if name == "farthest from":
        return {max(far, key=far.__getitem__)} if far else set()
    if name == "between":
        start, end = graph.center[anchors].astype(float)
        line = end - start
        length = float(np.hypot(*line))
        inside = set()
        for i in fits:
            dx, dy = graph.center[i] - start
            along = (dx * line[0] + dy * line[1]) / length**2
            across = abs(dx * line[1] - dy * line[0]) / length**2
            if 0.125 < along < 0.875 and across < 0.3:
                inside.add(i)
        return inside
    holds = {
        "left of": x < x[a], "right of": x > x[a], "above": y < y[a], "below": y > y[a],
        "behind": graph.depth > graph.depth[a], "in front of": graph.depth < graph.depth[a],
    }[name]  # fmt: skip
    return {i for i in fits if holds[i]}


def shaken(graph: SceneGraph, rng: np.random.Generator) -> SceneGraph:
    """The scene with every object moved by half a percent of the image, less than any predicate's margin."""
    return replace(
        graph,
        center=graph.center + rng.uniform(-0.005, 0.005, graph.center.shape).astype(np.float32),
        depth=graph.depth + rng.uniform(-0.02, 0.02, graph.depth.shape).astype(np.float32),
    )


@pytest.mark.parametrize("split", SPLITS)
def test_targets_are_what_a_plain_reading_of_a_shaken_scene_finds(split: Split) -> None:
    rng = np.random.default_rng(0)
    for graph, expression in sampled(split, 150):
        for scene in (graph, shaken(graph, rng)):
            assert read(scene, expression.query.phrase) == set(expression.targets), expression


def test_number_of_targets_fits_the_kind(corpus: list[Sample]) -> None:
    for graph, expression in corpus:
        count = len(expression.targets)
        if expression.kind.startswith("none_"):
            assert count == 0
        elif expression.kind == "plural":
            assert 2 <= count <= 6
        else:
            assert 1 <= count <= (6 if expression.query.plural else 1)
        assert expression.semantic.count == count
        assert list(expression.targets) == sorted(expression.targets, key=lambda i: graph.center[i, 0])
        assert resolve(graph, expression.query) == expression.targets


def test_landmarks_are_the_anchors_and_never_targets(corpus: list[Sample]) -> None:
    for graph, expression in corpus:
        anchors = [read(graph, landmark) for landmark in expression.query.phrase.landmarks]
        assert list(expression.landmarks) == [i for found in anchors for i in found]
        assert not set(expression.landmarks) & set(expression.targets)


def test_false_relations_name_objects_and_landmarks_that_exist(
    corpus: list[Sample],
) -> None:
    for graph, expression in corpus:
        if expression.kind == "none_relation":
            phrase = expression.query.phrase
            assert read(graph, replace(phrase, relation="", landmarks=()))
            assert len(expression.landmarks) == len(phrase.landmarks)


def test_hard_negatives_combine_a_colour_and_a_shape_that_are_both_there(
    corpus: list[Sample],
) -> None:
    negatives = [(g, e.query.phrase) for g, e in corpus if e.kind == "none_attribute"]
    hard = sum(
        bool(p.color and p.shape and read(g, Phrase(color=p.color)) and read(g, Phrase(shape=p.shape)))
        for g, p in negatives
    )
    assert hard / len(negatives) > 0.3


def test_words_name_exactly_the_properties_of_the_query(corpus: list[Sample]) -> None:
    surfaces = {shape: {word for pair in NOUNS[shape] for word in pair} for shape in SHAPES}
    surfaces |= {word: set(ADJECTIVES.get(word, (word,))) for word in SIZES + COLORS + MATERIALS}
    for _, expression in corpus:
        named = Counter(
            word.removeprefix("not ")
            for phrase in phrases(expression.query.phrase)
            for word in (phrase.shape, phrase.size, phrase.color, phrase.material)
            if word
        )
        words = expression.text.replace("non-", "").removeprefix("can you ").rstrip(".?").split()
        said = Counter(value for word in words for value, forms in surfaces.items() if word in forms)
        assert said == named, expression


def test_semantic_prompt_depends_on_the_words_only(corpus: list[Sample]) -> None:
    seen: dict[str, tuple[str, str, str]] = {}
    for _, expression in corpus:
        semantic = expression.semantic
        fields = (semantic.category, semantic.attributes, semantic.relation)
        assert seen.setdefault(expression.text, fields) == fields
        assert SemanticPrompt.parse(semantic.text) == semantic


@pytest.mark.parametrize("level", range(3))
def test_mix(level: int) -> None:
    kinds = Counter(expression.kind for _, expression in sampled("test", 500, level))
    total = sum(kinds.values())
    assert kinds.keys() == MIX[level].keys()
    for kind, share in MIX[level].items():
        assert kinds[kind] / total == pytest.approx(share, abs=0.025), kind
    nothing = sum(n for kind, n in kinds.items() if kind.startswith("none_"))
    assert nothing / total == pytest.approx(0.15, abs=0.015)


def test_first_level_speaks_of_properties_only() -> None:
    assert all(not expression.query.phrase.relation for _, expression in sampled("train", 100, level=0))


def test_paraphrases_are_many_and_the_vocabulary_is_small(corpus: list[Sample]) -> None:
    texts = [expression.text for _, expression in corpus]
    assert all(text == text.lower() for text in texts)
    vocabulary = {word for text in texts for word in re.findall(r"[a-z0-9'-]+", text)}
    assert len(vocabulary) <= 250
    properties = {form for forms in ADJECTIVES.values() for form in forms} | set(COLORS)
    templates = {
        " ".join("P" if word.removeprefix("non-") in properties else word for word in words)
        for words in (text.rstrip(".?").split() for text in texts)
    }
    assert len(templates) > 3000
    query = Query(Phrase("sphere", "", "red", "", "left of", (Phrase("cube", "large"),)))
    dice = Dice(0)
    assert len({express(query, 1, dice) for _ in range(1000)}) > 500


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_unseen_pairs_are_never_named_outside_the_compositional_split(split: Split) -> None:
    for _, expression in sampled(split, 200):
        for phrase in phrases(expression.query.phrase):
            assert (phrase.color, phrase.shape) not in HELD_OUT_PAIRS, expression


def test_compositional_targets_are_often_of_unseen_pairs() -> None:
    drawn = sampled("compositional", 100)
    pairs = [(g.describe(i)[1], g.describe(i)[3]) for g, e in drawn for i in e.targets]
    assert sum(pair in HELD_OUT_PAIRS for pair in pairs) / len(pairs) > 0.45


def test_equal_generators_give_equal_expressions_and_counts_extend() -> None:
    graph = sample_scene("train", 3)
    five, twelve = (sample_expressions(graph, n, np.random.default_rng(1)) for n in (5, 12))
    assert twelve[:5] == five
    assert sample_expressions(graph, 5, np.random.default_rng(2)) != five
    with pytest.raises(ValueError, match="level"):
        sample_expressions(graph, 1, np.random.default_rng(0), level=3)


def scene(*objects: tuple[str, float, float]) -> SceneGraph:
    """Red rubber objects of medium size at (x, y); depth grows towards the top."""
    n = len(objects)
    shape = np.array([SHAPES.index(name) for name, _, _ in objects], np.int64)
    center = np.array([place for _, *place in objects], np.float32)
    same = np.zeros(n, np.int64)
    return replace(
        sample_scene("train", 0),
        shape=shape,
        color=same,
        material=same,
        size=same + 1,
        radius=np.full(n, 0.08, np.float32),
        center=center,
        depth=1 - center[:, 1],
        rotation=np.zeros(n, np.float32),
    )


BALL, CUBE, CONE = Phrase("sphere"), Phrase("cube"), Phrase("cone")


def related(phrase: Phrase, relation: str, *landmarks: Phrase) -> Phrase:
    return replace(phrase, relation=relation, landmarks=landmarks)


@pytest.mark.parametrize(
    ("objects", "query", "expected"),
    [
        ([("sphere", 0.2, 0.5), ("sphere", 0.8, 0.5)], Query(BALL), AMBIGUOUS),
        ([("sphere", 0.2, 0.5), ("sphere", 0.8, 0.5)], Query(BALL, plural=True), (0, 1)),
        ([("sphere", 0.8, 0.5), ("sphere", 0.2, 0.5)], Query(BALL, plural=True), (1, 0)),
        ([("sphere", 0.2, 0.5)], Query(CUBE), ()),
        ([("sphere", 0.2, 0.5), ("cube", 0.5, 0.5)], Query(related(BALL, "left of", CUBE)), (0,)),
        ([("sphere", 0.8, 0.5), ("cube", 0.5, 0.5)], Query(related(BALL, "left of", CUBE)), ()),
        ([("sphere", 0.48, 0.2), ("cube", 0.5, 0.5)], Query(related(BALL, "left of", CUBE)), AMBIGUOUS),
        ([("sphere", 0.2, 0.5)], Query(related(BALL, "left of", CUBE)), ()),
        (
            [("sphere", 0.2, 0.5), ("cube", 0.5, 0.5), ("cube", 0.8, 0.5)],
            Query(related(BALL, "left of", CUBE)),
            AMBIGUOUS,
        ),
        ([("sphere", 0.2, 0.5), ("sphere", 0.22, 0.8)], Query(related(BALL, "leftmost")), AMBIGUOUS),
        ([("sphere", 0.2, 0.5), ("sphere", 0.4, 0.8)], Query(related(BALL, "second from left")), (1,)),
        ([("sphere", 0.2, 0.5), ("sphere", 0.4, 0.8)], Query(related(BALL, "third from left")), ()),
        (
            [("sphere", 0.2, 0.5), ("sphere", 0.8, 0.5), ("cube", 0.5, 0.5)],
            Query(related(BALL, "nearest to", CUBE)),
            AMBIGUOUS,
        ),
        (
            [("sphere", 0.5, 0.5), ("cube", 0.2, 0.5), ("cone", 0.8, 0.5)],
            Query(related(BALL, "between", CUBE, CONE)),
            (0,),
        ),
        (
            [("sphere", 0.5, 0.7), ("cube", 0.2, 0.5), ("cone", 0.8, 0.5)],
            Query(related(BALL, "between", CUBE, CONE)),
            AMBIGUOUS,
        ),
        (
            [("sphere", 0.2, 0.5), ("cube", 0.5, 0.5), ("cube", 0.5, 0.2), ("cone", 0.8, 0.35)],
            Query(related(BALL, "left of", related(CUBE, "behind", CONE))),
            (0,),
        ),
        (
            [("sphere", 0.2, 0.5), ("cube", 0.5, 0.5)],
            Query(related(Phrase(), "farthest from", CUBE)),
            (0,),
        ),
        ([("sphere", 0.2, 0.5), ("cube", 0.5, 0.5)], Query(Phrase(color="not red"), plural=True), ()),
    ],
)
def test_resolve(objects: list[tuple[str, float, float]], query: Query, expected: object) -> None:
    assert resolve(scene(*objects), query) == expected


def test_shrunken_objects_have_no_size_word() -> None:
    graph = scene(("sphere", 0.2, 0.5), ("cube", 0.5, 0.5))
    assert resolve(graph, Query(Phrase("sphere", size="medium"))) == (0,)
    shrunk = replace(graph, radius=graph.radius * np.float32(0.8))
    assert resolve(shrunk, Query(Phrase("sphere", size="medium"))) is AMBIGUOUS
    assert resolve(shrunk, Query(BALL)) == (0,)


def test_evaluation_examples_do_not_depend_on_the_order_they_are_asked_in() -> None:
    forward = list(scene_examples("test", range(20)))
    assert [example.index for example in forward] == list(range(20))
    for example in reversed(forward):
        again = scene_example("test", example.index, expressions=3)
        assert again.expressions[:1] == example.expressions
        assert np.array_equal(again.graph.center, example.graph.center)
    assert len({example.expressions[0].text for example in forward}) > 15


def test_contact_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sheet.png"
    assert main(["--sheet", str(path), "--count", "3", "--columns", "2", "--split", "crowded"]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    with Image.open(path) as sheet:
        assert sheet.width > 512 and sheet.height > 512
    (tmp_path / "file").touch()
    wrong = {"file/sheet.png": ("--count=1", OutputError), "other.png": ("--count=0", UsageError)}
    for name, (option, error) in wrong.items():
        assert main(["--sheet", str(tmp_path / name), option]) == error.exit_code
        assert capsys.readouterr().err.startswith("error: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "sheet.png"]
