"""The parts of the latency benchmark beyond its rows: traces, floors, fixed answers, random models."""

from __future__ import annotations

import csv
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import (
    card,
    floor,
    latency,
    random_bundle,
    random_model,
    rates,
    results,
    timeline,
    tracing,
    worker,
)
from benchmarks.fixed_answers import fix_answers
from benchmarks.rates import Rates
from benchmarks.torch_steps import cast, eager_pipeline
from benchmarks.tracing import ENCODER, HOST, MLLM, Event, Trace
from benchmarks.worker import PLAIN
from ppcr.checkpoint import Checkpoint
from ppcr.constraint import Constraint
from ppcr.errors import OutputError, UsageError
from ppcr.manifest import Manifest
from ppcr.model.reference import ReferencePipeline
from ppcr.tokenizer import PromptTokenizer
from ppcr.zero_shot import ZeroShotTokenizer, written
from runtime.bundle import Bundle
from tests import factory
from tests.sam_factory import mobile_sam_config
from tests.scripted import places, scripted

EXPRESSION = "the small red cube"


@pytest.fixture(scope="module")
def random_held() -> Bundle:
    return Bundle.load(factory.random_bundle())


@pytest.fixture(scope="module")
def reference() -> ReferencePipeline:
    return ReferencePipeline.load(factory.random_checkpoint())


@pytest.mark.parametrize("threads", [1, 2])
def test_a_trace_has_every_call_in_its_stage(random_held: Bundle, threads: int) -> None:
    said, where = "cube; red; any; one", places(100, 200, 300, 400, 150, 250)
    pipeline, mllm, segmenter = scripted(random_held, said, where, threads=threads)
    with pipeline:
        trace = tracing.trace(pipeline, factory.picture(5), EXPRESSION)
    assert trace.calls("semantic") == len(random_held.tokenizer.encode(said))
    assert trace.calls("spatial") == 6 and trace.calls("vision") == 0
    assert (mllm.images, segmenter.encoded, len(segmenter.batches)) == (1, 1, 1)
    by_stage = {event.stage: event for event in trace.events}
    assert set(by_stage) == {
        "image", "vision", "open", "semantic", "spatial", "encoder", "decoder", "masks"
    }  # fmt: skip
    assert by_stage["encoder"].stream == ENCODER and by_stage["decoder"].stream == HOST
    assert by_stage["vision"].stream == by_stage["spatial"].stream == MLLM
    assert all(0 <= event.start <= event.end <= trace.seconds + 1 for event in trace.events)
    assert [event.start for event in trace.events] == sorted(event.start for event in trace.events)
    assert trace.wall.keys() == trace.device.keys() == set(by_stage) - {"open"}
    assert Trace.from_json(json.loads(json.dumps(trace.to_json()))) == trace


def a_trace() -> Trace:
    events = (
        Event(HOST, "image", 0.0, 0.1),
        Event(MLLM, "vision", 0.1, 0.3),
        Event(MLLM, "semantic", 0.3, 0.5, 1, 90),
        Event(ENCODER, "encoder", 0.5, 0.9),
        Event(MLLM, "semantic", 0.5, 0.6, 1, 1),
        Event(MLLM, "spatial", 0.6, 0.8, 1, 5),
        Event(HOST, "decoder", 0.9, 1.0),
        Event(HOST, "masks", 1.0, 1.1),
    )
    return Trace(1.1, events, {"semantic": 0.3, "spatial": 0.2}, {"semantic": 0.3, "spatial": 0.2})


def test_how_much_of_the_encoder_is_hidden() -> None:
    assert timeline.hidden(a_trace()) == pytest.approx(0.75)
    alone = Trace(1.0, (Event(ENCODER, "encoder", 0.0, 1.0),), {}, {})
    assert timeline.hidden(alone) == timeline.hidden(Trace(1.0, (), {}, {})) == 0


def test_the_timeline_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    timeline.check(tmp_path / "t.png")
    timeline.draw(a_trace(), tmp_path / "t.png", "one request")
    with Image.open(tmp_path / "t.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] > 1000
    for stage in ("encoder", "spatial", "decoder"):
        colour = tuple(int(timeline.COLOURS[stage][i : i + 2], 16) for i in (1, 3, 5))
        assert (pixels == colour).all(axis=2).sum() > 500, stage
    with pytest.raises(OutputError, match=r"\.png"):
        timeline.check(tmp_path / "t.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["t.png"]


RATES = Rates("cpu", 2, ((1 << 20, 40e9), (64 << 20, 10e9)), {"fp32": 100e9, "int8": 300e9, "bf16": 200e9})


def test_rates_never_make_a_floor_too_high() -> None:
    # A working set between two measured ones counts as the larger of those that hold it, or the fastest.
    assert RATES.bandwidth(1 << 10) == RATES.bandwidth(1 << 20) == 40e9
    assert RATES.bandwidth(2 << 20) == RATES.bandwidth(1 << 40) == 10e9
    assert RATES.operations("fp32") == 100e9 and RATES.operations("bf16") == 200e9
    assert RATES.operations("int8") == RATES.operations("int4") == 300e9
    assert Rates.from_json(json.loads(json.dumps(RATES.to_json()))) == RATES


def test_floors_are_the_longer_of_reading_and_computing() -> None:
    weights = {
        "vision": 8_000_000, "decoder": 1000, "decoder_weights": 63_999_000, "image_encoder": 4_000_000,
        "mask_decoder": 4_000_000, "embedding": 1,
    }  # fmt: skip
    held = floor.by_stage(weights)
    assert held["semantic"] == held["spatial"] == 64_000_000 and "embedding" not in held
    stages = ("vision", "semantic", "spatial", "encoder", "decoder (one mask)")
    work = {stage: {"first": 1e9} for stage in stages}
    measured = {"vision": 0.03, "semantic": 0.04, "spatial": 0.02, "masks": 1.0}
    nothing = Trace(1.0, (), {}, {})
    found = floor.floors(work, held, [a_trace(), nothing], measured, RATES, "fp32")
    assert [one.stage for one in found] == ["vision", "semantic", "spatial"]
    vision, semantic, spatial = found
    assert (vision.computing_s, vision.reading_s) == (pytest.approx(0.01), pytest.approx(0.0008))
    assert vision.floor_s == pytest.approx(0.01) and vision.ratio == pytest.approx(3)
    # Two forward calls read the weights twice.
    assert semantic.calls == 2 and semantic.bytes == 128_000_000
    assert semantic.floor_s == pytest.approx(0.0128) and spatial.reading_s == pytest.approx(0.0064)
    told = floor.to_json(found, 0.0656)
    assert told["end_to_end_ratio"] == pytest.approx(0.0656 / (0.01 + 0.0128 + 0.01), rel=1e-3)
    lines = floor.table("fp32", found, 0.0656)
    assert lines[-1].split()[-5] == "2.0x" and len(lines) == 6
    assert floor.scaled(100, "fp32", "bf16") == 50 and floor.scaled(100, "int8", "fp16") == 200


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_LARGEST", 4 << 20)
    monkeypatch.setitem(rates.SIDE, rates.CPU, 96)
    found = rates.measured(rates.CPU, 1, [300, 2 << 20, 1 << 50])
    assert [size for size, _ in found.copy] == [1 << 20, 2 << 20, 4 << 20]
    assert all(1e7 < rate < 1e13 for _, rate in found.copy)
    assert found.matrix.keys() == {"fp32", "int8", "bf16"}
    assert all(1e6 < rate < 1e16 for rate in found.matrix.values())


def test_the_vision_towers_formula_counts_what_the_operators_do(reference: ReferencePipeline) -> None:
    config = reference.config.mllm
    grid = torch.tensor([[1, *(n * config.merge for n in config.grid)]])
    count = config.image_tokens * config.merge**2
    patches = torch.zeros(count, 3 * config.temporal * config.patch**2)
    reference.mllm.requires_grad_(False)
    with torch.no_grad():
        counted = card.counted(lambda: reference.mllm.model.visual(patches, grid_thw=grid))
    assert card.vision_flops(reference) == pytest.approx(counted, rel=1e-6)


def check_fixed(constraint: Constraint, seed: int) -> list[int]:
    """An answer of random allowed tokens; its length is the constraint's."""
    rng, cursor, ids = np.random.default_rng(seed), constraint.start(), list[int]()
    while not cursor.done:
        ids.append(int(rng.choice(cursor.allowed())))
        cursor.advance(ids[-1])
    assert len(ids) == constraint.max_tokens
    return ids


@pytest.mark.parametrize("kind", ["trained", "public"])
def test_fixed_answers_have_one_length_and_one_target(kind: str) -> None:
    known = factory.tokenizer().tokenizer
    tokenizer = (
        PromptTokenizer(known) if kind == "trained" else ZeroShotTokenizer(known, "qwen2_5_vl", "pixels")
    )
    free = tokenizer.semantic_constraint.max_tokens
    fix_answers(tokenizer)
    for seed in range(3):
        semantic = tokenizer.semantic(check_fixed(tokenizer.semantic_constraint, seed))
        assert semantic.count == 1
        located = tokenizer.spatial(check_fixed(tokenizer.spatial_constraint(5), seed), (448, 448))
        assert located.count == 1
    assert tokenizer.semantic_constraint.max_tokens == 1 + 2 + 5 + 3 + 1 < free
    # The class is as it was.
    assert PromptTokenizer(known).semantic_constraint.max_tokens == free


@pytest.mark.parametrize("forced", [True, False])
def test_eager_sessions_answer_as_the_reference(reference: ReferencePipeline, forced: bool) -> None:
    image = factory.picture(6)
    bundle, checkpoint = factory.random_bundle(), factory.random_checkpoint()
    pipeline = eager_pipeline(bundle, checkpoint, threads=1, forced=forced)
    scene = pipeline.open(image)
    for expression in (EXPRESSION, "all green cones"):
        wanted, got = reference.segment(image, expression), scene.segment(expression)
        assert got.semantic == wanted.semantic
        np.testing.assert_array_equal(got.spatial.locations, wanted.spatial.locations)
        assert (got.mask == wanted.mask).mean() > 0.999
        tokens = len(wanted.semantic_ids) + len(wanted.spatial_ids)
        assert got.costs.tokens == tokens
        assert got.costs.forward_calls == tokens if not forced else got.costs.forward_calls <= tokens


def test_the_plain_pipeline_in_bfloat16() -> None:
    half = cast(ReferencePipeline.load(factory.random_checkpoint()), torch.bfloat16)
    result = half.segment(factory.picture(7), EXPRESSION)
    assert half.mllm.dtype == torch.bfloat16 and result.mask_logits.dtype == np.float32
    assert len(result.instances) == result.spatial.count


def test_runs_are_saved_as_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    runs: list[dict[str, Any]] = [
        {"system": "fp32, odd", "seconds": 0.5},
        {"system": "int8", "seconds": None},
    ]
    results.save_runs("name", "latency.py", ["--images", "2"], {"cpu": "A Fine CPU"}, runs)
    text = (tmp_path / "results" / "name.csv").read_text()
    notes = [line for line in text.splitlines() if line.startswith("#")]
    assert notes == ["# command: python benchmarks/latency.py --images 2", "# cpu: A Fine CPU"]
    table = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    assert table == [{"system": "fp32, odd", "seconds": "0.5"}, {"system": "int8", "seconds": ""}]


def test_a_worker_has_settled_when_its_background_is_done() -> None:
    done = list[int]()

    def compile_something() -> None:
        until = time.process_time() + 0.6
        while time.process_time() < until:
            pass
        done.append(1)

    thread = threading.Thread(target=compile_something)
    thread.start()
    worker._settle()
    assert done and not thread.is_alive()


def test_random_models_have_names() -> None:
    assert random_bundle.parse("Qwen2.5-VL-3B+mobile-sam") == ("qwen2_5_vl-3B", "mobile-sam")
    assert random_bundle.parse("qwen2.5-vl-7b+sam2-tiny") == ("qwen2_5_vl-7B", "sam2-tiny")
    for wrong in ("qwen2.5-vl-3b", "qwen2.5-vl-3b+sam-vit-x", "gpt+mobile-sam", ""):
        with pytest.raises(UsageError, match="qwen2.5-vl-3b.*sam-vit-b"):
            random_bundle.parse(wrong)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--batch", "0"], "--batch must be 1 or more"),
        (["--layers", "2"], "--layers belongs to --random-weights"),
        (["--waterfall", "--without-torch"], "leave out --without-torch"),
        (["--random-weights", "x+y"], "does not know 'x+y'"),
        (["--engine", "fastest"], "unknown engine 'fastest'"),
    ],
)
def test_latency_refuses_at_once(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert latency.main(words) == UsageError.exit_code
    assert told in capsys.readouterr().err


def small_segmenter(text_dim: int, _: Path) -> Any:
    from ppcr.model.sam import SamSegmenter

    torch.manual_seed(0)
    return SamSegmenter(mobile_sam_config(text_dim=text_dim)).eval()


def test_a_random_model_is_built_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The published width of the vision tower, one block of it, over a decoder of one small layer.
    monkeypatch.setitem(random_model._QWEN2_5, "3B", (256, 320, 36, 2, 1, 4096, True))
    monkeypatch.setitem(random_bundle.SEGMENTERS, "mobile-sam", small_segmenter)
    words = [
        "--random-weights",
        "qwen2.5-vl-3b+mobile-sam",
        "--layers",
        "1",
        "--precision",
        "int4",
        "--engine",
        "onnxruntime",
    ]
    words += ["--images", "1", "--repeats", "1", "--threads", "1", "--work", str(tmp_path)]
    assert latency.main(words) == 0
    out = capsys.readouterr().out
    told = json.loads(out.splitlines()[-1])
    assert told["random_weights"] is True and told["mean_mask_iou"] is None and told["agreement"] is None
    assert "reduced to 1 layers" in told["note"] and "reduced to 1 layers" in out
    assert told["model"] == "random qwen2.5-vl-3b+mobile-sam-1-layers"
    assert told["speedup"] > 0 and told["speedup_counts"] is True and told["cold_start"] is None
    both = told["by_threads"]["1"]
    assert set(both) == {"int4", PLAIN}
    root = tmp_path / "qwen2.5-vl-3b-mobile-sam-1-layers"
    config = Checkpoint.open(root / "checkpoint").config
    assert config.box_convention == "pixels" and config.mllm.image_size == (448, 448)
    # Both rows wrote answers of the same fixed length.
    tokenizer = Bundle.load(root / "bundle").tokenizer
    fix_answers(tokenizer)
    length = tokenizer.semantic_constraint.max_tokens + tokenizer.spatial_constraint(1).max_tokens
    assert told["tokens"] == length
    # What each expression reads has as many tokens as in Qwen's own vocabulary, where these were counted.
    texts = [tokenizer.between_stages, *(tokenizer.encode(written([[123, 45, 678, 90]] * n)) for n in (1, 2))]
    assert [len(text) for text in texts] == [24, 31, 56]
    assert set(Manifest.load(root / "bundle").precisions) == {"int4"}
    assert latency.main([*words, "--without-torch"]) == 0
    again = capsys.readouterr().out
    assert "as built before" in again and json.loads(again.splitlines()[-1])["speedup"] is None
