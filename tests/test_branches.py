"""Conversations side by side in one cache: the logits and answers of each are those it has by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.examples import examples
from export.decoder_graph import DecoderSizes, write_decoder
from ppcr import masks
from ppcr.constraint import Choice, Constraint, Free, Literal
from ppcr.manifest import Shapes
from ppcr.tensors import TensorFiles
from runtime.generation import Turn, generate
from runtime.host_context import HostDecoder
from runtime.onnxruntime_branches import OnnxBranches
from runtime.onnxruntime_context import OnnxContext
from runtime.onnxruntime_library import open_graph
from runtime.pipeline import Pipeline
from runtime.positions import Rotary, make_tables
from runtime.processor import has_bf16
from runtime.session import Branches, BranchingContext
from runtime.side_by_side import Ask, Conversation, converse
from runtime.threads import Threads
from runtime.timing import Stopwatch
from runtime.torch_decoder import DeviceTables, TorchDecoder, TorchSlot
from runtime.torch_session import TorchContext, TorchMLLM
from tests import families
from tests.families import FAMILIES, IMAGE, Small
from tests.scripted import assert_same

GRID, LIMIT = (2, 3), 200
TRUNK = [7, 1, *[IMAGE] * 6, 2]


# Logits of each branch, on every engine that can.


class Model:
    """A random decoder of a family; ``open`` gives a conversation on an engine that holds the image."""

    def __init__(self, family: str, folder: Path) -> None:
        size = Small(family)
        model = size.build()
        families.save(model, folder)
        config = size.config().to_dict()
        self.path = folder / "decoder.onnx"
        self.graphs: Any = None
        sizes = write_decoder(config, TensorFiles(folder), self.path)
        self.shapes = _shapes(sizes)
        self.session = open_graph(self.path, 1)
        embedding = model.get_input_embeddings().weight.detach().numpy().copy()
        rotary = Rotary(sizes.head_dim, sizes.rope_theta, sizes.mrope_section, sizes.mrope_interleaved)
        self.tables = make_tables(LIMIT, TRUNK.index(IMAGE), GRID, rotary)
        self.host = HostDecoder(self.shapes, self.tables, embedding, IMAGE)
        rng = np.random.default_rng(5)
        levels = (1 + sizes.deepstack, 6, sizes.hidden) if sizes.deepstack else (6, sizes.hidden)
        self.features = rng.standard_normal(levels).astype(np.float32)
        self.torch = _TorchSession(model, self.shapes)

    def open(self, engine: str) -> Any:
        if engine == "torch":
            with torch.no_grad():
                slot = TorchSlot(
                    self.torch._decoder, DeviceTables.of(self.tables, torch.zeros(0)), graph=False
                )
            context: Any = TorchContext(self.torch, slot)
            features = self.features if self.features.ndim == 3 else self.features[None]
            context.extend(TRUNK, torch.from_numpy(features))
            return context
        if engine == "openvino":
            context = self._open_openvino()
        else:
            context = OnnxContext((self.session, self.session), self.host, LIMIT)
        context.extend(TRUNK, self.features)
        return context

    def _open_openvino(self) -> Any:
        """Everything in float32, to be compared."""
        from runtime import openvino_block, openvino_context, openvino_step

        if self.graphs is None:
            blocks = openvino_block.BlockGraphs(self.path, self.shapes, Threads(1, 1, 1, 1, 1), bf16=False)
            blocks.foresee()
            self.graphs = blocks, openvino_step.StepGraphs(self.path, self.shapes, 1)
        blocks, steps = self.graphs
        return openvino_context.OpenVinoContext(blocks, self.host, LIMIT, steps.of(LIMIT))


class _TorchSession(TorchMLLM):
    """The torch session over a decoder alone."""

    def __init__(self, model: Any, shapes: Shapes) -> None:
        self._decoder, self._image_token = TorchDecoder(model, shapes), IMAGE
        self._like, self._lock, self._free = self._decoder.table[:0], threading.Lock(), []


def _shapes(sizes: DecoderSizes) -> Any:
    return SimpleNamespace(
        layers=sizes.layers, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim, hidden=sizes.hidden,
        vocabulary=sizes.vocabulary, deepstack=sizes.deepstack, max_length=LIMIT,
    )  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(request.param, tmp_path_factory.mktemp(request.param))


_NO_OPENVINO = pytest.mark.skipif(
    find_spec("openvino") is None, reason="openvino is not installed: pip install '.[openvino]'"
)
engines = pytest.mark.parametrize(
    "engine", ["onnxruntime", "torch", pytest.param("openvino", marks=_NO_OPENVINO)]
)


@engines
def test_logits_of_every_branch_are_those_of_a_conversation_of_its_own(model: Model, engine: str) -> None:
    rng, count = np.random.default_rng(1), 5
    context = model.open(engine)
    branching: BranchingContext = context
    assert isinstance(branching, BranchingContext) and branching.can_branch
    branches = branching.branch(count)
    texts: list[list[int]] = [[] for _ in range(count)]
    for call in range(12):
        # Lengths from nothing to many; in the first call two begin alike and two are the same.
        given_parts = {
            branch: rng.integers(8, 192, rng.integers(1, 9)).tolist()
            for branch in range(count)
            if call == 0 or rng.random() < 0.7
        }
        if call == 0:
            given_parts[1] = given_parts[0][:2] + given_parts[1]
            given_parts[4] = given_parts[3]
        if not given_parts:
            continue
        logits = branches.extend(given_parts).copy()
        for (branch, part), row in zip(given_parts.items(), logits, strict=True):
            texts[branch] += part
            assert branches.length(branch) == len(TRUNK) + len(texts[branch])
            alone = model.open(engine).extend(texts[branch])
            np.testing.assert_allclose(row, alone, atol=1e-4 * np.abs(alone).max())
            assert row.argmax() == alone.argmax()
    # The conversation they began with holds what it held.
    text = [9, 30, 31]
    np.testing.assert_allclose(context.extend(text), model.open(engine).extend(text), atol=1e-6)


@engines
def test_images_and_too_much_text_are_refused(model: Model, engine: str) -> None:
    branches = model.open(engine).branch(2)
    refused: list[dict[int, list[int]]] = [{0: [IMAGE]}, {1: [9] * LIMIT}, {0: []}, {}]
    for wrong in refused:
        with pytest.raises(ValueError):
            branches.extend(wrong)


def test_a_graph_of_one_answer_says_so(tmp_path: Path) -> None:
    size = Small("qwen2_5_vl", layers=1)
    families.save(size.build(), tmp_path)
    config = size.config().to_dict()
    sizes = write_decoder(config, TensorFiles(tmp_path), tmp_path / "fixed.onnx", max_length=64)
    session = open_graph(tmp_path / "fixed.onnx", 1)
    rotary = Rotary(sizes.head_dim, sizes.rope_theta, sizes.mrope_section)
    tables = make_tables(64, 2, GRID, rotary)
    host = HostDecoder(_shapes(sizes), tables, np.zeros((192, 128), np.float32), IMAGE)
    context = OnnxContext((session, session), host, 64)
    assert not context.can_branch


# Whole answers.


def talk(
    prompt: Sequence[int],
    kinds: Sequence[Constraint],
    said: list[Turn],
    drafts: Sequence[tuple[int, ...]] = ((), ()),
) -> Conversation[tuple[int, ...]]:
    """Turns one after the other; an answer that begins with an even token is the last, as "none" is."""
    before: tuple[int, ...] = tuple(prompt)
    tokens: tuple[int, ...] = ()
    for number, (constraint, draft) in enumerate(zip(kinds, drafts, strict=True)):
        turn = yield Ask("semantic", before, constraint, afresh=number == 0, draft=draft)
        assert turn is not None
        said.append(turn)
        tokens += turn.tokens
        before = (*turn.unread, 20, 21)
        if turn.tokens[0] % 2 == 0:
            break
    return tokens


def constraint(rng: np.random.Generator) -> Constraint:
    """Fields of open length, forced runs and choices, in any order."""
    makers: list[Callable[[], Any]] = [
        lambda: Literal(tuple(rng.integers(8, 192, rng.integers(1, 4)).tolist())),
        lambda: Choice(tuple(range(40, 140))),
        lambda: Free(tuple(range(60, 180)), 30, int(rng.integers(1, 6))),
    ]
    return Constraint(tuple(makers[kind]() for kind in (1, *rng.integers(0, 3, rng.integers(1, 5)))))


@engines
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_answers_are_those_of_one_at_a_time(model: Model, engine: str, count: int) -> None:
    rng = np.random.default_rng(count)
    prompts = [rng.integers(8, 192, rng.integers(1, 14)).tolist() for _ in range(count)]
    kinds = [[constraint(rng) for _ in range(2)] for _ in range(count)]
    if count > 4:  # the same question twice, and one that begins like another
        prompts[3], kinds[3] = prompts[1], kinds[1]
        prompts[4] = [*prompts[2], 77]
    turns: list[list[Turn]] = [[] for _ in range(count)]
    context = model.open(engine)
    branches = Watched(context.branch(count))
    watches, begun = [Stopwatch() for _ in range(count)], list[int]()
    conversations = [talk(*given_talk) for given_talk in zip(prompts, kinds, turns, strict=True)]
    answers = converse(branches, conversations, watches, lambda: begun.append(len(branches.calls)))
    for row, (prompt, wanted) in enumerate(zip(prompts, kinds, strict=True)):
        alone: list[Turn] = []
        assert answers[row] == by_itself(model.open(engine), talk(prompt, wanted, alone))
        assert turns[row] == alone  # what it cost as well
        assert sum(turn.forward_calls for turn in alone) == sum(row in call for call in branches.calls)
        assert set(watches[row].stages) == {"semantic"}
    assert begun == [1]
    # One call for all that still speak: as many as the longest conversation has.
    assert len(branches.calls) == max(sum(t.forward_calls for t in row) for row in turns)
    if count == 16:
        assert len({len(row) for row in turns}) == 2  # some stopped after the first turn


def by_itself(context: Any, conversation: Conversation[tuple[int, ...]]) -> tuple[int, ...]:
    """What a conversation comes to on a context of its own."""
    turn = None
    while True:
        try:
            ask = conversation.send(turn)
        except StopIteration as end:
            answer: tuple[int, ...] = end.value
            return answer
        turn = generate(context, ask.tokens, ask.constraint, draft=ask.draft)


@engines
def test_drafts_make_calls_fewer_and_answers_no_different(model: Model, engine: str) -> None:
    rng, count = np.random.default_rng(), 5
    prompts = [rng.integers(8, 192, rng.integers(1, 14)).tolist() for _ in range(count)]
    kinds = [[constraint(rng) for _ in range(2)] for _ in range(count)]
    plain: list[list[Turn]] = [[] for _ in range(count)]
    answers = [
        by_itself(model.open(engine), talk(prompt, kind, said))
        for prompt, kind, said in zip(prompts, kinds, plain, strict=True)
    ]
    drafts = [[draft_of(turn, rng) for turn in said] + [()] * (2 - len(said)) for said in plain]
    drafts[0] = [turn.tokens for turn in plain[0]] + [()] * (2 - len(plain[0]))
    turns: list[list[Turn]] = [[] for _ in range(count)]
    branches = Watched(model.open(engine).branch(count))
    talks = [talk(*told) for told in zip(prompts, kinds, turns, drafts, strict=True)]
    assert converse(branches, talks, [Stopwatch() for _ in range(count)], lambda: None) == answers
    assert sum(turn.accepted for said in turns for turn in said) > 0
    assert [turn.forward_calls for turn in turns[0]] == [min(1, turn.forward_calls) for turn in plain[0]]
    for row, said in enumerate(turns):
        alone: list[Turn] = []
        context = model.open(engine)
        assert by_itself(context, talk(prompts[row], kinds[row], alone, drafts[row])) == answers[row]
        assert said == alone
        assert context.length == branches.length(row) == alone[-1].length


def draft_of(turn: Turn, rng: np.random.Generator) -> tuple[int, ...]:
    """The answer up to anywhere, then anything."""
    return (*turn.tokens[: rng.integers(0, len(turn.tokens) + 1)], *rng.integers(8, 192, 3).tolist())


def test_scenes_expressions_of_all_kinds_have_the_masks_they_have_alone(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[int]()
    original = OnnxBranches.extend

    def counted(self: OnnxBranches, told: Any, guesses: Any = None) -> Any:
        calls.append(len(told))
        return original(self, told, guesses)

    monkeypatch.setattr(OnnxBranches, "extend", counted)
    counts = set[int]()
    with Pipeline.load(bundle, engine="onnxruntime", threads=1) as pipeline:
        for scene in examples("test", range(300, 303), expressions=16):
            texts = [expression.text for expression in scene.expressions]
            opened = pipeline.open(scene.image)
            for text, together in zip(texts, opened.segment_many(texts), strict=True):
                assert_same(together, pipeline.open(scene.image).segment(text))
                counts.add(together.semantic.count)
    assert {0, 1, 2} <= counts and max(calls) == 16 and min(calls) == 1


@pytest.mark.skipif(not has_bf16(), reason="this processor has no bfloat16 instructions")
@_NO_OPENVINO
def test_masks_of_bf16_are_those_they_have_alone_but_for_rounding(bundle: Path) -> None:
    same, overlaps = list[bool](), list[float]()
    with Pipeline.load(bundle, engine="openvino", precision="bf16", threads=2) as pipeline:
        for scene in examples("test", range(300, 304), expressions=16):
            texts = [expression.text for expression in scene.expressions]
            opened = pipeline.open(scene.image)
            for text, together in zip(texts, opened.segment_many(texts), strict=True):
                alone = opened.segment(text)
                assert together.semantic == alone.semantic
                same.append(np.array_equal(together.spatial.locations, alone.spatial.locations))
                overlaps.append(masks.iou(together.mask, alone.mask))
    assert np.mean(same) > 0.9 and np.mean(overlaps) > 0.99


class Watched:
    """Notes which branches each call reads for."""

    def __init__(self, inner: Branches) -> None:
        self.inner, self.calls = inner, list[list[int]]()

    def length(self, branch: int) -> int:
        return self.inner.length(branch)

    def truncate(self, branch: int, length: int) -> None:
        self.inner.truncate(branch, length)

    def extend(self, given_parts: Any, guesses: Any = None) -> Any:
        self.calls.append(list(given_parts))
        return self.inner.extend(given_parts, guesses)
