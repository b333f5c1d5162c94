"""Blocks of tokens on OpenVINO: the shipped decoder's, in bfloat16 and not, against onnxruntime."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from ppcr.errors import BundleError
from runtime.bundle import Bundle
from runtime.host_context import Cache, HostDecoder, empty_cache
from runtime.onnxruntime_context import OnnxContext
from runtime.onnxruntime_library import open_graph
from runtime.positions import Tables, make_tables
from runtime.threads import Threads

ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install '.[openvino]'")

from runtime import openvino_block, openvino_decoder, openvino_library  # noqa: E402
from runtime.openvino_block import ANSWERS, SIZES, BlockGraphs  # noqa: E402

ONE = Threads(1, 1, 1, 1, 1)
LENGTH = 320


class Blocks:
    """The shipped decoder: ids of a text, and the parts of it that are read."""

    def __init__(self, loaded: Bundle) -> None:
        self.bundle, self.shapes, self.path = loaded, loaded.manifest.shapes, loaded.graphs["decoder"]
        grid = loaded.config.mllm.grid_of(loaded.config.mllm.image_size)
        start = len(loaded.tokenizer.before_image)
        self.tables: Tables = make_tables(self.shapes.max_length, start, grid, loaded.rotary)
        ids = np.random.default_rng().integers(100, self.shapes.vocabulary // 2, LENGTH)
        self.ids = np.where(ids == loaded.tokenizer.image_token, 100, ids)

    def read(self, graphs: BlockGraphs, cache: Cache, start: int, end: int, answers: int = 1) -> np.ndarray:
        rows = {
            "inputs_embeds": self.bundle.embedding[self.ids[start:end]],
            "rope_cos": self.tables.cos[start:end],
            "rope_sin": self.tables.sin[start:end],
        }
        wanted = np.arange(end - start - answers, end - start)
        return graphs.read(rows, cache, start, self.tables.mask[start:end, :end], wanted)

    def reference(self, path: Path | None = None) -> OnnxContext:
        session = open_graph(path or self.path, 1)
        token = self.bundle.tokenizer.image_token
        host = HostDecoder(self.shapes, self.tables, self.bundle.embedding, token)
        return OnnxContext((session, session), host, LENGTH)


@pytest.fixture(scope="module")
def blocks(loaded: Bundle) -> Blocks:
    return Blocks(loaded)


@pytest.fixture(scope="module")
def graphs(blocks: Blocks) -> BlockGraphs:
    if not openvino_library.has_bf16(ov.Core()):
        pytest.skip("this processor has no bfloat16 instructions")
    return BlockGraphs(blocks.path, blocks.shapes, ONE)


def held(cache: Cache, start: int, end: int) -> np.ndarray:
    return np.stack([memory[0, :, start:end] for memory in cache.values()])


def spread(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_the_first_layers_are_computed_in_bfloat16(blocks: Blocks, graphs: BlockGraphs) -> None:
    parts = [(0, 17, 1), (17, 19, 2), (21, 104, 40), (104, LENGTH, 200)]  # the last one is read in several
    for start, end, answers in parts:
        exact, cache = blocks.reference(), empty_cache(blocks.shapes, LENGTH)
        if start:
            exact.extend(blocks.ids[:start].tolist())
            for place, memory in exact.snapshot().items():
                cache[place][:, :, :start] = memory
        found = blocks.read(graphs, cache, start, end, answers)
        wanted = exact.verify(blocks.ids[start:end].tolist(), answers - 1)
        assert 1e-4 < spread(found, wanted) < 2e-2
        ours, theirs = held(cache, start, end), held(exact._cache, start, end)
        assert spread(ours[0], theirs[0]) > 1e-4  # from the first layer on
        assert spread(ours, theirs) < 2e-2
        assert not held(cache, end, LENGTH).any()


def test_what_a_token_gets_depends_on_no_graph(
    blocks: Blocks, graphs: BlockGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = BlockGraphs(blocks.path, blocks.shapes, Threads(2, 2, 1, 1, 2))
    start, end = 37, 37 + 13
    found = []
    many = [(size, answers) for size in SIZES for answers in sorted({min(size, ANSWERS), size})]
    for length in (96, LENGTH):
        for kind in many:
            for one in (graphs, two):
                cache = empty_cache(blocks.shapes, length)
                blocks.read(graphs, cache, 0, start)
                with monkeypatch.context() as patch:
                    patch.setattr(openvino_block, "_fitting", lambda *_, kind=kind: [kind])
                    logits = blocks.read(one, cache, start, end, 5)
                found.append((logits, held(cache, 0, end)))
    assert len(found) == 4 * len(many) and len(many) > 5
    for logits, memory in found[1:]:
        np.testing.assert_array_equal(logits, found[0][0])
        np.testing.assert_array_equal(memory, found[0][1])


def test_nobody_sees_what_the_mask_hides(blocks: Blocks, graphs: BlockGraphs) -> None:
    rng, start, end = np.random.default_rng(), 60, 75
    answers = []
    for length in (64 + 32, LENGTH):  # looked at where it lies, and copied
        cache = empty_cache(blocks.shapes, length)
        blocks.read(graphs, cache, 0, start)
        rows = {
            "inputs_embeds": blocks.bundle.embedding[blocks.ids[start:end]],
            "rope_cos": blocks.tables.cos[start:end],
            "rope_sin": blocks.tables.sin[start:end],
        }
        sees = blocks.tables.mask[start:end, :end].copy()
        sees[:, 20:50] = False
        for _ in range(2):
            for memory in cache.values():
                memory[:, :, 20:50] = rng.normal(size=memory[:, :, 20:50].shape)
                memory[:, :, end:] = rng.normal(size=memory[:, :, end:].shape)
            answers.append(graphs.read(rows, cache, start, sees, [end - start - 1]).copy())
    for other in answers[1:]:
        np.testing.assert_array_equal(other, answers[0])
    cache = empty_cache(blocks.shapes, LENGTH)
    blocks.read(graphs, cache, 0, start)
    assert spread(blocks.read(graphs, cache, start, end), answers[0]) > 1e-3  # to see it makes a difference


def test_threads_may_share_the_graphs(blocks: Blocks, graphs: BlockGraphs) -> None:
    parts = [(0, 12), (0, 90), (0, 11), (0, 95), (0, 110), (0, 16)]
    alone: list[np.ndarray] = []
    together = dict[int, Any]()

    def talk(start: int, end: int) -> np.ndarray:
        cache = empty_cache(blocks.shapes, LENGTH)
        blocks.read(graphs, cache, start, end)
        return blocks.read(graphs, cache, end, end + 20, 3)

    alone = [talk(*part) for part in parts]
    workers = [
        threading.Thread(target=lambda n=n, part=part: together.update({n: talk(*part)}))  # type: ignore[misc]
        for n, part in enumerate(parts)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for n, wanted in enumerate(alone):
        np.testing.assert_array_equal(together[n], wanted)


def test_layers_without_names_are_computed_in_float32(blocks: Blocks, tmp_path: Path) -> None:
    model = onnx.load(blocks.path)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                if openvino_decoder._LAYER.fullmatch(name):
                    names[at] = f"other_{name}"
    onnx.save(model, tmp_path / "decoder.onnx")
    graphs = BlockGraphs(tmp_path / "decoder.onnx", blocks.shapes, ONE)
    found = blocks.read(graphs, empty_cache(blocks.shapes, LENGTH), 0, 50, 3)
    assert spread(found, blocks.reference().verify(blocks.ids[:50].tolist(), 2)) < 1e-5


def test_a_better_graph_is_made_for_the_blocks_to_come(
    blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = BlockGraphs(blocks.path, blocks.shapes, ONE)
    cache, whole = empty_cache(blocks.shapes, LENGTH), (SIZES[-1], ANSWERS)
    ready = lambda: {kind for kind, made in graphs._graphs._ordered.items() if made.result()}  # noqa: E731
    assert ready() == {whole}
    blocks.read(graphs, cache, 0, 9)  # the larger one does, and no other is asked for
    assert ready() == {whole}
    graphs.foresee()
    blocks.read(graphs, cache, 0, 9)
    assert ready() == {whole, (16, 16)}


def test_another_graph_is_refused(loaded: Bundle) -> None:
    with pytest.raises(BundleError, match=r"image_encoder.onnx is no decoder"):
        BlockGraphs(loaded.graphs["image_encoder"], loaded.manifest.shapes, ONE)
