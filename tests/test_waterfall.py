"""Rows and steps of the latency benchmark: what can be tried, the waterfall, the ways of a batch."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import (
    rows,
    throughput,
    waterfall,
)
from benchmarks.latency_model import Model
from benchmarks.rows import RowPlan
from benchmarks.timing import Spread
from benchmarks.worker import PLAIN, Run, Task
from benchmarks.workers import Row
from ppcr import masks
from ppcr.errors import BundleError, EngineError, UsageError
from ppcr.manifest import DRAFTS
from runtime import selection
from runtime.bundle import Bundle
from runtime.selection import ENGINES, Candidate
from tests import factory


def test_rows_are_what_can_be_tried() -> None:
    held = Bundle.load(factory.random_bundle())
    folder, manifest = held.folder, held.manifest
    assert rows.plan(folder, manifest, ["onnxruntime"], None) == (
        [RowPlan("onnxruntime", "fp32"), RowPlan("onnxruntime", "int8")], {},
    )  # fmt: skip
    found, left_out = rows.plan(folder, manifest, ["tensorrt", "onnxruntime"], ["fp32"])
    assert [row.name for row in found] == ["fp32"] and list(left_out) == ["tensorrt fp32"]
    assert RowPlan("openvino", "bf16").name == "openvino bf16"
    with pytest.raises(BundleError, match="int3"):
        rows.plan(folder, manifest, ["onnxruntime"], ["fp32", "int3"])
    with pytest.raises(EngineError, match="tensorrt"):
        rows.plan(folder, manifest, ["tensorrt"], ["fp32"])
    torch_rows = rows.plan(folder, manifest, ["torch"], None, checkpoint=factory.random_checkpoint())[0]
    assert {row.precision for row in torch_rows} == {"bf16", "fp16", "fp32"}
    found, left_out = rows.plan(folder, manifest, ["all"], ["fp32"])
    engines = {row.engine for row in found}
    assert "onnxruntime" in engines and engines | set(left_out) >= set(ENGINES)
    assert not engines & set(left_out)
    assert rows.engines_named("all, auto") == ["all", "auto"]
    with pytest.raises(UsageError, match="unknown engine 'x'"):
        rows.engines_named("onnxruntime,x")
    with pytest.raises(UsageError, match="the engines are"):
        rows.engines_named(" , ")


def a_row(task: Task, seconds: list[float]) -> Row:
    """Images of as many runs as there are ``seconds``, twice."""
    mask = masks.encode_rle(np.ones((2, 2), np.bool_))
    runs = [Run(taken, taken, {"semantic": taken}, {}, 9, 7, 0, 0, 0.5, mask) for taken in seconds]
    row = Row(task, 0.1, False, 50.0, engine={"engine": "fake", "precision": "fp32"})
    for image in (0, 1):
        row.first.append(((image, 0), runs[0]))
        row.second += [((image, place), run) for place, run in enumerate(runs[1:], 1)]
    return row


def test_the_waterfall_lists_every_step(tmp_path: Path) -> None:
    plans = [RowPlan("onnxruntime", "fp32"), RowPlan("onnxruntime", "int8")]
    listed = waterfall.steps(tmp_path / "b", tmp_path / "c", plans, tmp_path / "e.npz", 2, fixed=False)
    tasks = {step.name: step.task for step in listed}
    assert [name for name, task in tasks.items() if task is None] == [
        "+ CUDA graph of the step", "+ fp16, bf16 or fp8 on a GPU",
    ]  # fmt: skip
    run = [task for task in tasks.values() if task is not None]
    assert len({task.system for task in run}) == len(run) == 8
    assert run[0].kind == PLAIN and run[0].source == str(tmp_path / "c")
    assert [(task.drafts, task.overlap, task.together, task.precision) for task in run[3:]] == [
        (False, False, False, "fp32"), (True, False, False, "fp32"), (True, True, False, "fp32"),
        (True, True, True, "fp32"), (True, True, True, "int8"),
    ]  # fmt: skip
    found = [
        waterfall.figures("plain torch", a_row(run[0], [0.4])),
        waterfall.figures("+ encoder beside the MLLM", a_row(run[5], [0.2, 0.1, 0.05, 0.05])),
        waterfall.figures("+ expressions in one call", a_row(run[6], [0.04] * 4), judged=False),
    ]
    assert found[0].each.p50 == 0.4 and found[1].each.p50 == pytest.approx(0.1)
    assert found[1].first is not None and found[1].first.p50 == 0.2 and found[2].first is None
    lines = waterfall.table(listed, found, {"+ int8": "no such engine"})
    assert len(lines) == 2 + len(listed)
    assert "2.00x" in lines[8] and "4.00x" in lines[8] and "50.00" in lines[8]
    assert lines[6].endswith(waterfall.NOT_RUN) and lines[10].endswith("no such engine")
    told = waterfall.to_json(listed, found, {})
    assert [("not_run" in one) for one in told] == [False, *[True] * 5, False, False, True, True]
    assert told[7]["mean_mask_iou"] is None and json.loads(json.dumps(told)) == told


def test_with_one_thread_nothing_runs_beside_the_mllm(tmp_path: Path) -> None:
    listed = waterfall.steps(tmp_path, tmp_path, [RowPlan("onnxruntime", "fp32")], tmp_path, 1, fixed=False)
    told = {one["step"]: one["not_run"] for one in waterfall.to_json(listed, [], {})}
    assert told["+ encoder beside the MLLM"] == waterfall.ALONE
    assert told["+ CUDA graph of the step"] == waterfall.NOT_RUN


def test_on_a_gpu_the_whole_waterfall_is_there(tmp_path: Path) -> None:
    plans = [RowPlan("tensorrt", "fp16", on_gpu=True)]
    listed = waterfall.steps(tmp_path, tmp_path, plans, tmp_path, 4, fixed=True)
    assert all(step.task is not None for step in listed)
    assert {step.task.device for step in listed if step.task} == {"cuda"}


def test_throughput_is_against_separate_calls() -> None:
    found = [
        throughput.Throughput(way, 16, Spread.of([seconds]), iou, 100.0)
        for way, seconds, iou in (
            (throughput.SEPARATE, 1.6, 0.8), (throughput.KEPT, 0.8, 0.8), (throughput.TOGETHER, 0.2, None)
        )
    ]  # fmt: skip
    told = throughput.to_json("fp32", 2, found)
    assert told["throughput_gain"] == 8 and told["ways"]["one scene"]["expressions_per_s"] == 20
    lines = throughput.table("fp32", 2, found)
    assert "8.00x" in lines[-1] and lines[-1].split()[-2] == "-"


@pytest.mark.parametrize(
    ("taken", "summarised"),
    [(("openvino", "bf16"), 2), (("openvino", "int8"), 0), (None, 0)],
)
def test_the_summary_is_about_what_auto_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: tuple[str, str] | None, summarised: int
) -> None:
    rows = (RowPlan("openvino", "fp32"), RowPlan("onnxruntime", "fp32"), RowPlan("openvino", "bf16"))

    def choose(*_: object, **__: object) -> Candidate:
        if taken is None:
            raise EngineError("none starts here")
        return Candidate(taken[0], usable=True, precision=taken[1])

    monkeypatch.setattr(selection, "choose", choose)
    manifest = SimpleNamespace(default_precision="fp32", files={DRAFTS: None})
    source = SimpleNamespace(root=tmp_path)
    model = Model(tmp_path, source, manifest, rows, {})  # type: ignore[arg-type]
    assert model.default_row is rows[summarised]
    assert model.ladder[0] is rows[0]
    names = [task.system for task in model.tasks(tmp_path, 1, torch=False)]
    plain = [row.name for row in rows]
    assert names == [
        *plain[: summarised + 1], f"{plain[summarised]}, no drafts", *plain[summarised + 1 :]
    ]  # fmt: skip
