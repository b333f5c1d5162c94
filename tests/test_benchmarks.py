"""Both benchmarks through their command lines, and the figures they are made of."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import accuracy, latency, machine, report
from benchmarks.ablation import BOTH, VARIANTS, best
from benchmarks.examples import examples
from benchmarks.rows import RowPlan
from benchmarks.systems import Answer, segmenter_prompts
from benchmarks.timing import Spread, measure
from benchmarks.worker import PLAIN, Run, Task
from benchmarks.workers import Row, failure
from ppcr import masks
from ppcr.data.scenes import scene_example
from ppcr.errors import BundleError, EngineError
from ppcr.evaluation.metrics import Case, summarise
from ppcr.prompts import SemanticPrompt, SpatialPrompt
from ppcr.tokenizer import PromptTokenizer
from runtime import selection

ACCURACY_KEYS = {"miou", "oiou", "precision_at_0.5", "none_recall", "none_false_rate", "n"}
LATENCY_KEYS = {
    "stages", "end_to_end_p50_s", "plain_torch_p50_s", "speedup", "second_expression_speedup",
    "mean_mask_iou", "peak_memory_mb",
}  # fmt: skip


def run_script(root: Path, script: str, *words: object) -> tuple[list[str], dict[str, Any]]:
    """Lines of stdout, and the JSON object in the last of them."""
    command = [sys.executable, f"benchmarks/{script}.py", *map(str, words)]
    run = subprocess.run(command, cwd=root, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    last: dict[str, Any] = json.loads(lines[-1])
    return lines, last


def test_accuracy_of_a_bundle_with_ablation(root: Path, bundle: Path) -> None:
    lines, last = run_script(
        root, "accuracy", "--bundle", bundle, "--split", "val", "--limit", 5, "--ablate", "--threads", 1
    )
    assert last.keys() >= ACCURACY_KEYS
    assert (last["n"], last["split"], last["protocol"]) == (5, "val", "default")
    assert sum(kind["n"] for kind in last["kinds"].values()) == 5
    assert list(last["ablation"]) == list(VARIANTS)
    assert last["ablation"][BOTH]["miou"] == last["miou"]
    assert last["ablation"]["single-turn box"]["none_recall"] in (0.0, None)
    assert set(last["best"].split(", ")) <= set(VARIANTS)
    assert any(line.startswith("protocol  default (") for line in lines)
    assert f"best: {last['best']}" in lines


def test_accuracy_of_the_reference(root: Path, checkpoint: Path) -> None:
    words = ("--checkpoint", checkpoint, "--split", "crowded", "--limit", 2, "--threads", 1, "--ablate")
    _, last = run_script(root, "accuracy", *words)
    assert last.keys() >= ACCURACY_KEYS and last["n"] == 2
    assert "torch reference" in last["system"]


def test_latency(root: Path, bundle: Path, checkpoint: Path) -> None:
    words = ("--images", 2, "--repeats", 1, "--threads", 1)
    lines, last = run_script(root, "latency", "--bundle", bundle, "--checkpoint", checkpoint, *words)
    assert last.keys() >= LATENCY_KEYS
    assert {"vision", "semantic"} <= set(last["stages"])
    assert last["cold_start"]["torch_loaded"] is False
    # The engine that is taken unasked, and onnxruntime beside it where that is another.
    taken = selection.choose(bundle)
    first = RowPlan(taken.name, taken.precision).name
    rows = {first, f"{first}, no drafts", "fp32", "int8", PLAIN}
    assert set(last["by_threads"]) == {"1"} and set(last["by_threads"]["1"]) == rows
    assert last["accepted_share"] > 0.5 and last["forward_calls"] < last["tokens"]
    assert last["speedup"] == pytest.approx(last["plain_torch_p50_s"] / last["end_to_end_p50_s"], rel=1e-2)
    assert last["second_expression_p50_s"] > 0 and last["second_expression_speedup"] > 0
    # torch alone takes more than a bundle on onnxruntime. OpenVINO holds several graphs of one decoder, and
    # with them about as much as torch.
    assert 20 < last["by_threads"]["1"]["fp32"]["peak_memory_mb"] < last["plain_torch_peak_memory_mb"]
    assert 20 < last["peak_memory_mb"] < 1.2 * last["plain_torch_peak_memory_mb"]
    # The fp32 engine answers as the reference does; that masks decoded here agree shows the rows' pairing.
    assert last["by_threads"]["1"]["fp32"]["agreement"] > 0.95
    assert lines[0].startswith(f"compared  {first}")
    assert last["engine"] == taken.name and last["left_out"] == {} and last["random_weights"] is False
    assert not {"floor", "waterfall", "batch"} & set(last)


def test_latency_with_everything_beside(root: Path, bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ("--images", 1, "--repeats", 1, "--threads", 2, "--precision", "fp32", "--batch", 5)
    more = ("--engine", "onnxruntime", "--floor", "--waterfall", "--timeline", tmp_path / "timeline.png")
    lines, last = run_script(root, "latency", "--bundle", bundle, "--checkpoint", checkpoint, *words, *more)
    floors = last["floor"]["2"]
    assert floors["rates"]["cpu"]["matrix"]["fp32"] > 0 and floors["rates"]["cpu"]["threads"] == 2
    stages = floors["fp32"]["stages"]
    assert {"vision", "semantic"} <= set(stages) and all(one["floor_s"] > 0 for one in stages.values())
    assert floors["fp32"]["floors_s"] == pytest.approx(sum(one["floor_s"] for one in stages.values()))
    steps = {one["step"]: one for one in last["waterfall"]}
    assert steps["+ CUDA graph of the step"]["not_run"] == "needs a GPU, not run"
    run = {name: one for name, one in steps.items() if "not_run" not in one}
    assert len(run) == 7 and run["plain torch"]["engine"] == "torch eager"
    kept, forced = run["+ KV cache kept"], run["+ forced literals"]
    assert forced["forward_calls"] <= kept["forward_calls"]
    # The same weights in fp32 throughout: every step draws the same masks, or nearly.
    assert kept["mean_mask_iou"] == pytest.approx(run["+ encoder beside the MLLM"]["mean_mask_iou"], abs=0.02)
    guessed = run["+ stage 1 guessed and checked"]
    assert guessed["forward_calls"] < forced["forward_calls"]
    assert run["+ expressions in one call"]["first"] is None
    ways = last["batch"]["ways"]
    assert last["batch"]["expressions"] == 5 and set(ways) == {"separate calls", "one scene", "one call"}
    assert ways["one call"]["mean_mask_iou"] == pytest.approx(
        ways["separate calls"]["mean_mask_iou"], abs=0.02
    )
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    assert any(line.startswith("timeline  ") for line in lines)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--split", "train"], 2, "invalid choice"),
        (["--limit", "0"], 2, "--limit must be 1 or more"),
        (["--protocol", "cris"], 2, "invalid choice"),
        (["--checkpoint", "x", "--precision", "int8"], 2, "fp32"),
        (["--bundle", "no-such-bundle"], 6, "export/build_engines.py"),
        (["--checkpoint", "no-such-checkpoint"], 7, "does not exist"),
    ],
)
def test_accuracy_tells_what_is_wrong(
    words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert accuracy.main(words) == code
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--images", "0"], 2, "--images must be 1 or more"),
        (["--repeats", "0"], 2, "--repeats must be 1 or more"),
        (["--threads", "1", "0"], 2, "threads must be 1 to"),
        (["--save", "../x"], 2, "plain name"),
        (["--bundle", "no-such-bundle"], 6, "export/build_engines.py"),
    ],
)
def test_latency_tells_what_is_wrong(
    words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latency.main(words) == code
    assert told in capsys.readouterr().err


def test_latency_asks_for_precisions_that_are_there(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert latency.main(["--bundle", str(bundle), "--precision", "fp32,int3"]) == BundleError.exit_code
    assert "int3" in capsys.readouterr().err
    assert latency.main(["--bundle", str(bundle), "--precision", PLAIN]) == 2


def test_a_failed_worker_is_told_as_what_it_was() -> None:
    told = failure(6, "some warning\nerror: this bundle is damaged\n", "int8")
    assert isinstance(told, BundleError) and str(told) == "int8: this bundle is damaged"
    killed = failure(-9, "", "fp32")
    assert isinstance(killed, EngineError) and str(killed) == "fp32: ended with exit code -9"


def test_spread_and_measure() -> None:
    spread = Spread.of([0.001 * n for n in range(1, 102)])
    assert (spread.p50, spread.p90, spread.n) == (pytest.approx(0.051), pytest.approx(0.091), 101)
    assert spread.to_json() == {"p50_s": 0.051, "p90_s": 0.091, "p99_s": 0.1, "n": 101}
    with pytest.raises(ValueError, match="nothing was timed"):
        Spread.of([])
    calls: list[float] = []

    def body() -> None:
        calls.append(0.0)
        time.sleep(0.2 if len(calls) <= 2 else 0.001)

    timed = measure(body, warmup=2, repeats=3)
    assert len(calls) == 5 and timed.n == 3
    assert timed.p50 < 0.2  # the slow calls were the warm-up


def test_machine_says_hardware_and_versions(tmp_path: Path) -> None:
    told = machine.describe()
    assert {"cpu", "cores", "memory_mb", "python", "numpy", "onnxruntime", "torch", "date"} <= set(told)
    assert told["numpy"] == np.__version__
    json.dumps(told)
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name\t: A Fine CPU @ 2 GHz\nmodel name\t: Another\n")
    assert machine.cpu_model(info) == "A Fine CPU @ 2 GHz"
    assert machine.cpu_model(tmp_path / "none") in str(told["system"])
    stat = tmp_path / "stat"
    stat.write_text("cpu  10 0 10 80 0 0 0 0 0 0\ncpu0 10 0 10 80 0 0 0 0 0 0\n")
    assert not machine.is_busy(0.0, stat=stat)  # no time has passed
    assert isinstance(machine.is_busy(0.01), bool)
    status = tmp_path / "status"
    status.write_text("VmPeak:\t9999 kB\nVmHWM:\t  2048 kB\n")
    assert machine.peak_memory_mb(status) == 2.0
    assert machine.peak_memory_mb() > 10


def test_gpu_memory_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.peak_gpu_memory_mb() is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 3 << 20)
    assert machine.peak_gpu_memory_mb() == 3.0
    monkeypatch.delitem(sys.modules, "torch")
    assert machine.peak_gpu_memory_mb() is None


def test_examples_hold_the_union_of_the_targets() -> None:
    (example,) = examples("test", [3], expressions=4, size=64)
    scene = scene_example("test", 3, expressions=4)
    assert [one.text for one in example.expressions] == [one.text for one in scene.expressions]
    assert example.image.shape == (64, 64, 3) and example.image.dtype == np.uint8
    assert example.truths.shape == (4, 64, 64)
    for one, truth in zip(scene.expressions, example.truths, strict=True):
        assert truth.any() == bool(one.targets)
    (again,) = examples("test", [3], size=64)
    assert np.array_equal(again.truths, example.truths[:1])


class Pictured:
    """A view that writes down what it was asked, and draws a mask for each kind of prompt."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None, int | None]] = []

    def answer(self, expression: str, semantic: SemanticPrompt | None = None) -> Answer:
        self.asked.append((expression, text_of(semantic), None))
        return answer_of(semantic or SemanticPrompt("cube", count=2))

    def draw(self, semantic: SemanticPrompt | None, spatial: SpatialPrompt | None) -> masks.BoolMask:
        self.asked.append(("draw", text_of(semantic), spatial.count if spatial else None))
        return np.zeros((4, 4), np.bool_)


def text_of(semantic: SemanticPrompt | None) -> str | None:
    return semantic.text if semantic else None


def answer_of(semantic: SemanticPrompt) -> Answer:
    boxes = np.tile(np.array([0.1, 0.1, 0.5, 0.5], np.float32), (semantic.count, 1))
    return Answer(semantic, SpatialPrompt(boxes, boxes[:, :2]), np.ones((4, 4), np.bool_))


def test_ablation_leaves_out_what_it_says() -> None:
    asked = {}
    for name, variant in VARIANTS.items():
        view = Pictured()
        said_none, mask = variant.run(view, "cubes", answer_of(SemanticPrompt("cube", count=2)))
        assert not said_none and mask.all() == (name == BOTH)
        asked[name] = view.asked
    assert asked == {
        BOTH: [],
        "without semantic": [("draw", None, 2)],
        "without spatial": [("draw", "cube; any; any; two", None)],
        "single-turn box": [("cubes", "object; any; any; one", None), ("draw", None, 1)],
    }


def test_ablation_variants_decline_by_stage_one_alone() -> None:
    nothing = Answer(SemanticPrompt("cube", count=0), SpatialPrompt.empty(), np.zeros((4, 4), np.bool_))
    declined = {name: variant.run(Pictured(), "cubes", nothing)[0] for name, variant in VARIANTS.items()}
    assert declined == dict.fromkeys(VARIANTS, True) | {"single-turn box": False}


def test_best_names_every_winner() -> None:
    good, bad = summarise([Case(4, 4, True, False)]), summarise([Case(1, 4, True, False)])
    assert best({"a": bad, "b": good, "c": bad}) == "b"
    assert best({"a": good, "b": good, "c": bad}) == "a, b"


def test_prompts_of_the_segmenter_with_either_left_out(bundle: Path) -> None:
    tokenizer = PromptTokenizer.load(bundle / "tokenizer.json")
    table = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)
    semantic, spatial = (
        SemanticPrompt("cube", "red", count=2),
        answer_of(SemanticPrompt("cube", count=2)).spatial,
    )
    ids = tokenizer.encode(semantic.text)
    both = segmenter_prompts(semantic, spatial, tokenizer, table, max_text=64)
    assert both.text_embeddings.shape == (2, len(ids), 8) and both.text_mask.all()
    assert np.array_equal(both.text_embeddings[1], table[ids]) and both.spatial_valid.tolist() == [1, 1]
    assert np.array_equal(both.boxes, spatial.boxes)
    no_text = segmenter_prompts(None, spatial, tokenizer, table, max_text=64)
    assert no_text.text_mask.shape == (2, 1) and not no_text.text_mask.any()
    no_place = segmenter_prompts(semantic, None, tokenizer, table, max_text=3)
    assert no_place.spatial_valid.tolist() == [0] and no_place.text_embeddings.shape == (1, 3, 8)


def a_row(system: str, seconds: list[float], second: list[float], iou: float, mask: np.ndarray) -> Row:
    def a_run(taken: float) -> Run:
        stages = {"semantic": taken / 2, "encoder": taken / 4}
        return Run(taken, taken, stages, stages, 10, 8, 4, 3, iou, masks.encode_rle(mask))

    row = Row(Task(system, "", "", 1), 0.5, system == PLAIN, 100.0)
    row.first = [((image, 0), a_run(taken)) for image, taken in enumerate(seconds)]
    row.second = [((image, 1), a_run(taken)) for image, taken in enumerate(second)]
    return row


def test_figures_of_rows() -> None:
    whole, half = np.ones((4, 4), np.bool_), np.arange(16).reshape(4, 4) < 8
    engine, broken, plain = report.figures(
        [
            a_row("fp32", [0.02, 0.03, 0.04], [0.01, 0.01, 0.02], 0.9, whole),
            a_row("int8", [0.01], [0.01], 0.5, half),
            a_row(PLAIN, [0.2, 0.3, 0.4], [], 0.9, whole),
        ]
    )
    assert engine.speedup == pytest.approx(10) and engine.counts
    assert (engine.drafted, engine.accepted) == (4, 0.75)
    assert engine.second_speedup == pytest.approx(3) and plain.second_speedup is None
    assert (engine.agreement, broken.agreement) == (1.0, 0.5)
    assert engine.stages["semantic"].p50 == pytest.approx(0.015) and "decoder" not in engine.stages
    assert not broken.counts
    shown = report.table([engine, broken, plain])
    assert "10.00x" in shown[2] and "wrong" in shown[3] and "x" not in shown[3].split("int8")[1]
    cold = {"torch_loaded": False}
    told = report.summary([engine, broken, plain], cold, "fp32", 1)
    assert told.keys() >= LATENCY_KEYS and told["speedup_counts"] is True
    assert set(told["stages"]) == {"semantic", "encoder"} and told["plain_torch_p50_s"] == 0.3
    assert json.loads(json.dumps(told)) == told
