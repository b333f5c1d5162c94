"""The torch session on the CPU against the reference; what needs a GPU is held to fakes of torch's calls."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ppcr import masks
from ppcr.errors import CheckpointError, EngineError
from ppcr.manifest import Shapes
from ppcr.model.reference import ReferencePipeline
from runtime import torch_device, torch_session
from runtime.bundle import Bundle
from runtime.pipeline import Pipeline
from runtime.positions import Rotary, make_tables
from runtime.torch_decoder import DeviceTables, TorchDecoder, TorchSlot
from runtime.torch_graph import record
from tests.families import Conversation, Small, worst

GRID = (3, 5)
EXPRESSIONS = ("all red spheres behind the green cube", "the small cube", "the cube")


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, engine="torch", threads=1) as made:
        if made.engine["device"] != "cpu":
            pytest.skip("there is a GPU here: this compares the CPU's answers")
        yield made


def picture(samples: Path, number: int) -> np.ndarray:
    return np.asarray(Image.open(samples / f"scene_{number}.png").convert("RGB"))


def test_both_turns_and_masks_are_the_references(pipeline: Pipeline, samples: Path) -> None:
    reference, found = ReferencePipeline.load(), 0
    for number, expression in enumerate(EXPRESSIONS):
        image = picture(samples, number % 2)
        wanted = reference.segment(image, expression)
        scene = pipeline.open(image)
        for result in (scene.segment(expression), scene.segment(expression)):
            assert result.semantic.text == wanted.semantic.text
            np.testing.assert_array_equal(result.spatial.locations, wanted.spatial.locations)
            assert masks.iou(result.mask, wanted.mask) > 0.9999
            np.testing.assert_allclose(result.scores, wanted.scores, atol=1e-5)
            found += len(result.scores)
        assert result.engine["engine"] == "torch" and result.engine["precision"] == "fp32"
    assert found > 2


def test_many_expressions_share_one_batch(pipeline: Pipeline, samples: Path) -> None:
    scene = pipeline.open(picture(samples, 0))
    for together, expression in zip(scene.segment_many(EXPRESSIONS), EXPRESSIONS, strict=True):
        alone = pipeline.open(picture(samples, 0)).segment(expression)
        assert together.semantic == alone.semantic
        np.testing.assert_array_equal(together.spatial.locations, alone.spatial.locations)
        assert masks.iou(together.mask, alone.mask) > 0.9999


def test_half_precision_keeps_the_masks(bundle: Path, pipeline: Pipeline, samples: Path) -> None:
    box: dict[str, Any] = {"semantic": "cube; any; any; one", "boxes": [60, 60, 140, 150]}
    with Pipeline.load(bundle, engine="torch", precision="bf16", threads=1) as half:
        assert half.engine["precision"] == "bf16"
        answers = [p.open(picture(samples, 0)).segment("a cube", **box) for p in (pipeline, half)]
    assert masks.iou(answers[0].mask, answers[1].mask) > 0.9


def test_conversations_do_not_share_a_cache_and_slots_are_used_again(
    pipeline: Pipeline, loaded: Bundle
) -> None:
    mllm: Any = pipeline.sessions.mllm
    prefix = loaded.tokenizer.before_image
    first, second = mllm.open(64, prefix=prefix), mllm.open(64, prefix=prefix)
    assert first.length == second.length == len(prefix)
    alone = first.extend([7, 8, 9]).copy()
    second.extend([30, 31])
    first.truncate(len(prefix))
    np.testing.assert_array_equal(first.extend([7, 8, 9]), alone)
    with pytest.raises(ValueError, match="do not fit"):
        first.extend([1] * first.capacity)
    with pytest.raises(ValueError, match="image tokens, but features of 0"):
        first.extend([loaded.tokenizer.image_token, 5])
    with pytest.raises(ValueError, match="cannot truncate"):
        first.truncate(first.length + 1)
    with pytest.raises(ValueError, match="1 to"):
        mllm.open(first.capacity + 1)
    slots = {id(first._slot), id(second._slot)}
    del first, second
    gc.collect()
    assert {id(mllm.open()._slot)} <= slots


@pytest.mark.parametrize("size", [Small("qwen2_5_vl", tied=False), Small("qwen3_vl", heads=6, layers=2)])
def test_decoder_equals_transformers_in_blocks_and_steps(size: Small) -> None:
    model = size.build()
    said = Conversation.random(size, 11, GRID)
    wanted = said.logits(model)
    with torch.no_grad():
        seen = model.model.visual(said.patches, grid_thw=said.inputs()["image_grid_thw"])
        features = torch.stack(torch_session._features(seen))
        slot = small_slot(size, model, said)
        image = range(said.image_start, said.image_start + GRID[0] * GRID[1])
        cuts = [0, 2, image.stop + 1, image.stop + 4, *range(image.stop + 5, len(said.ids) + 1)]
        for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
            if stop - start == 1:
                logits = slot.step(said.ids[start], start)
            else:
                inside = [n - start for n in image if start <= n < stop]
                places = torch.tensor(inside) if inside else None
                block = torch.tensor(said.ids[start:stop])
                logits = slot.block(block, start, places, features if inside else None)
            assert worst(logits.numpy(), wanted[stop - 1]) <= 1e-4
    assert len(said.ids) - image.stop > 5


def small_slot(size: Small, model: Any, said: Conversation, *, graph: bool = False) -> TorchSlot:
    shapes = Shapes(
        max_length=64, image_tokens=15, grid=GRID, patches=60, patch_dim=1, layers=size.layers,
        kv_heads=size.kv_heads, head_dim=size.head_dim, hidden=size.hidden, vocabulary=size.vocabulary,
        rope_theta=1e4, mrope_section=tuple(size.section), image_size=(8, 8), mask_size=(4, 4), max_text=8,
    )  # fmt: skip
    rotary = Rotary(size.head_dim, 1e4, tuple(size.section), size.family == "qwen3_vl")
    tables = make_tables(shapes.max_length, said.image_start, GRID, rotary)
    decoder = TorchDecoder(model, shapes)
    slot = TorchSlot(decoder, DeviceTables.of(tables, decoder.table), graph=graph)
    # Not zero: what lies behind the mask must not matter.
    slot._cache.fill_(3.0)
    return slot


class FakeGraph:
    """A CUDA graph that runs its work again when it is replayed, into the tensors it captured."""

    replayed = 0
    work: Any
    result: Any

    def replay(self) -> None:
        type(self).replayed += 1
        found = self.work()
        for held, new in zip(parts(self.result), parts(found), strict=True):
            held.copy_(new)


def parts(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def fake_cuda(monkeypatch: pytest.MonkeyPatch, told: list[str], failing: Exception | None = None) -> None:
    class Stream:
        def wait_stream(self, other: Any) -> None:
            told.append("wait")

        def synchronize(self) -> None:
            told.append("synchronize")

    @contextlib.contextmanager
    def capture(graph: FakeGraph, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        told.append("capture")
        if failing is not None:
            raise failing
        yield

    monkeypatch.setattr(FakeGraph, "replayed", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", capture)


def test_the_step_is_warmed_up_captured_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    size = Small("qwen2_5_vl", layers=1)
    said = Conversation.random(size, 6, GRID)
    plain = small_slot(size, size.build(), said)
    told: list[str] = []
    fake_cuda(monkeypatch, told)
    real = TorchSlot._run_step

    def counted(slot: TorchSlot) -> torch.Tensor:
        told.append("run")
        return real(slot)

    monkeypatch.setattr(TorchSlot, "_run_step", counted)
    with torch.no_grad():
        slot = small_slot(size, size.build(), said, graph=True)
        assert told == ["wait", "run", "run", "run", "wait", "capture", "run"]
        assert slot.has_graph
        recorded = slot._recorded
        assert recorded is not None
        recorded.graph.work, recorded.graph.result = slot._run_step, recorded.result  # type: ignore[attr-defined]
        for at, token in enumerate((9, 11, 12)):
            np.testing.assert_array_equal(slot.step(token, at), plain.step(token, at))
    assert FakeGraph.replayed == 3


def test_without_a_graph_the_step_runs_and_one_warning_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    size = Small("qwen2_5_vl", layers=1)
    said = Conversation.random(size, 6, GRID)
    fake_cuda(monkeypatch, [], RuntimeError("operation not permitted when stream is capturing\nmore"))
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="without a CUDA graph: operation not permitted"):
        slot = small_slot(size, size.build(), said, graph=True)
    assert not slot.has_graph
    with torch.no_grad():
        assert slot.step(9, 0).isfinite().all()


def test_the_image_encoder_is_recorded_and_every_image_keeps_its_features(
    monkeypatch: pytest.MonkeyPatch, loaded: Bundle
) -> None:
    sessions = torch_session.load(loaded, threads=1, device="cpu")
    segmenter: Any = sessions.segmenter
    rng, side = np.random.default_rng(3), loaded.manifest.shapes.image_size
    images = [rng.normal(size=(3, *side)).astype(np.float32) for _ in range(2)]
    wanted = [segmenter.encode(image) for image in images]
    fake_cuda(monkeypatch, [])
    with torch.no_grad():
        recorded = record(segmenter._see, "the image encoder")
        assert recorded is not None
        recorded.graph.work, recorded.graph.result = segmenter._see, recorded.result  # type: ignore[attr-defined]
        segmenter._recorded = recorded
        got = [segmenter.encode(image) for image in images]
    for one, other in zip(got, wanted, strict=True):
        assert type(one) is type(other)
        for mine, theirs in zip(one, other, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_fp32_is_not_rounded_to_ten_bits(monkeypatch: pytest.MonkeyPatch, loaded: Bundle) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch_session.load(loaded, threads=1, device="cpu", precision="fp32")
    assert not torch.backends.cudnn.allow_tf32


def test_devices_that_cannot_be_used_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def old() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040).\nPlease update"
        )

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", old)
    with pytest.raises(EngineError, match=r"cannot use the GPU: .*too old \(found version 11040\)\.$"):
        torch_device.choose_device("cuda")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(EngineError, match="built without CUDA"):
        torch_device.choose_device("cuda")
    assert torch_device.choose_device("cpu").type == "cpu"


def test_too_little_memory_says_how_much_is_needed_and_what_is_smaller(
    monkeypatch: pytest.MonkeyPatch, loaded: Bundle
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300_000_000, 8_000_000_000))
    gpu = torch.device("cuda")
    torch_device.require_room(299_000_000, "fp32", gpu)
    told = "needs about 7000 MB on the GPU at fp32, 300 of 8000 MB are free: .*--precision bf16"
    with pytest.raises(EngineError, match=told):
        torch_device.require_room(7_000_000_000, "fp32", gpu)
    source = torch_session._open(loaded.manifest, None)
    half, full = (torch_session._bytes_needed(source, loaded, t) for t in (torch.bfloat16, torch.float32))
    weights = sum(path.stat().st_size for path in source.root.rglob("*.safetensors"))
    assert full == 2 * half and weights < full < 4 * weights

    @torch_device.at_work
    def hungry() -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB.\nmore"
        )

    with pytest.raises(EngineError, match=r"^CUDA out of memory\. Tried to allocate 2\.00 GiB: close other"):
        hungry()


def test_another_checkpoint_is_refused(loaded: Bundle, checkpoint: Path) -> None:
    other = replace(loaded, manifest=replace(loaded.manifest, source="0" * 64))
    with pytest.raises(EngineError, match="--checkpoint"):
        torch_session.load(other, threads=1, device="cpu")
    with pytest.raises(CheckpointError, match="not the checkpoint that this bundle was made from"):
        torch_session.load(other, threads=1, device="cpu", checkpoint=checkpoint)
    with pytest.raises(EngineError, match="fp32, fp16, bf16, not in int8"):
        torch_session.load(loaded, threads=1, device="cpu", precision="int8")
