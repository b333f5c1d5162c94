"""Any engine held to the gate: its figures come into the manifest, whole or not at all."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import build_engines, engine_parity, parity
from ppcr.errors import CheckpointError, EngineError, ParityError
from ppcr.manifest import MANIFEST, Manifest, Parity, parity_key
from runtime import selection


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


def check(copy: Path, *arguments: str) -> int:
    return build_engines.main(["--output", str(copy), "--parity-scenes", "1", *arguments])


def test_an_engines_figures_come_into_the_manifest_and_are_read(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Manifest.load(copy)
    assert check(copy, "--check-engine", "torch", "--precision", "fp32") == 0
    said = capsys.readouterr().out
    after = Manifest.load(copy)
    key = next(name for name in after.parity if name.startswith("torch"))
    found = after.parity[key]
    assert found.scenes == 1 and found.passed and found.mean_iou == 1.0
    assert f"{key}" in said and "passed" in said and MANIFEST in said
    assert dataclasses.replace(after, parity=before.parity) == before
    assert selection.choose(copy, "torch").gate == "passed"
    # What was built is still up to date: the figures of other engines say nothing of the graphs.
    graphs = [{name for name in each.parity if name in each.precisions} for each in (before, after)]
    assert graphs[0] == graphs[1]


def test_an_engine_that_disagrees_fails_and_is_remembered(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = Parity(1, 0.0, 0.25, 0.25, False)
    monkeypatch.setattr(engine_parity.ReferencePipeline, "load", lambda checkpoint: None)
    monkeypatch.setattr(engine_parity, "judge", lambda *_: bad)
    assert check(copy, "--check-engine", "onnxruntime", "--precision", "int8") == ParityError.exit_code
    told = capsys.readouterr().err
    assert "int8 disagrees" in told and "mean mask IoU 0.2500 (gate 0.98)" in told
    assert Manifest.load(copy).parity["int8"] == bad


def test_a_foreign_checkpoint_is_refused_and_nothing_is_written(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = dataclasses.replace(Manifest.load(copy), source="0" * 64)
    manifest.save(copy)
    text = (copy / MANIFEST).read_bytes()
    assert check(copy, "--check-engine", "onnxruntime") == CheckpointError.exit_code
    assert "was not made from" in capsys.readouterr().err
    assert (copy / MANIFEST).read_bytes() == text
    assert check(copy, "--check-engine", "onnxruntime", "--precision", "fp32,int8") == 2


def test_masks_and_tokens_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((8, 8), np.bool_)
    mask[2:5, 2:5] = True

    class Scene:
        def segment(self, expression: str) -> Any:
            return type("Result", (), {"mask": mask if expression == "same" else ~mask})()

    class Engine:
        engine = {"precision": "fp32"}

        def open(self, image: Any) -> Scene:
            return Scene()

    class Reference:
        pass

    reference = Reference()
    reference.mask = mask  # type: ignore[attr-defined]
    monkeypatch.setattr(parity, "same_tokens", lambda result, wanted: True)

    def figures(*expressions: str) -> Parity:
        cases: Any = [parity.Case(np.zeros((8, 8, 3), np.uint8), e, reference) for e in expressions]  # type: ignore[arg-type]
        engine: Any = Engine()
        return parity.compare(engine, cases, lambda name: None)

    assert figures("same", "same") == Parity(2, 1.0, 1.0, 1.0, True)
    assert figures("same", "other") == Parity(2, 1.0, 0.5, 0.0, False)
    assert parity_key("openvino", "bf16") == "openvino bf16" and parity_key("onnxruntime", "int8") == "int8"


class Answers:
    """Stands for the reference, and counts."""

    given = 0

    def segment(self, image: Any, expression: str) -> int:
        self.given += 1
        return self.given


def test_scenes_are_answered_once_when_they_are_asked_for() -> None:
    reference: Any = Answers()
    told: list[str] = []
    cases = parity.Cases(reference, 3, told.append)
    assert reference.given == 0
    few = cases.first(cases.count)
    assert cases.first(3) == few and reference.given == len(told) == 3
    more = cases.first(parity.LARGER * 3)
    assert more[:3] == few and len(more) == reference.given == 12
    scenes = list(parity.held_out(12))
    for case, (image, example) in zip(more, scenes, strict=True):
        assert np.array_equal(case.image, image) and case.expression == example.expressions[0].text


@pytest.mark.parametrize(
    ("same", "iou", "scenes", "again"),
    [
        (0.945, 0.998, 128, True),
        (0.92, 0.98, 128, True),
        (0.961, 0.998, 128, True),  # passed, and by chance perhaps
        (0.88, 0.998, 128, False),  # too far off for chance
        (0.992, 0.998, 128, False),
        (1.0, 0.998, 128, False),
        (0.0, 0.998, 128, False),
        (0.945, 0.97, 128, False),  # other masks
        (0.945, 0.998, 99, False),  # too few to say anything
    ],
)
def test_what_is_too_close_to_a_gate_is_judged_over_more_scenes(
    same: float, iou: float, scenes: int, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Parity(scenes, same, iou, 0.9, same >= 0.95 and iou >= 0.98)
    many = Parity(4 * scenes, 0.94, 0.99, 0.9, False)
    asked: list[int] = []
    drawn = next(parity.held_out(1))

    def compare(pipeline: Any, cases: Any, progress: Any) -> Parity:
        asked.append(len(cases))
        return few if len(asked) == 1 else many

    class Engine:
        engine = {"precision": "bf16"}

    monkeypatch.setattr(parity, "compare", compare)
    monkeypatch.setattr(parity, "held_out", lambda count: [drawn] * count)
    cases, engine = parity.Cases(Answers(), scenes, lambda name: None), Engine()  # type: ignore[arg-type]
    found = parity.judge(engine, cases, lambda name: None)  # type: ignore[arg-type]
    # What the larger number of scenes says counts, whatever it is.
    assert (found, asked) == ((many, [scenes, 4 * scenes]) if again else (few, [scenes]))


def test_a_build_measures_the_faster_engines_that_are_here(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.load(copy)
    there: list[str] = []
    cases: Any = []

    def choose(bundle: Any, engine: str, *, precision: str) -> selection.Candidate:
        if engine not in there:
            raise EngineError(f"engine {engine!r} cannot be used here: not installed")
        return selection.Candidate(engine, True, precision=precision)

    monkeypatch.setattr(engine_parity.selection, "choose", choose)
    assert engine_parity.faster_here(manifest) == []
    assert engine_parity.measure_faster(copy, cases, print) == {}
    there.append("openvino")
    assert engine_parity.faster_here(manifest) == [("openvino", "bf16")]
    # Unasked, an engine's own precision stands for fp32 alone.
    assert engine_parity.faster_here(dataclasses.replace(manifest, default_precision="int8")) == []
    loaded: list[dict[str, str]] = []

    class Opened:
        def __enter__(self) -> Opened:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    def load(folder: Path, **options: str) -> Opened:
        loaded.append(options)
        return Opened()

    passed = Parity(3, 1.0, 0.998, 0.98, True)
    monkeypatch.setattr(engine_parity.Pipeline, "load", load)
    monkeypatch.setattr(engine_parity, "judge", lambda *_: passed)
    assert engine_parity.measure_faster(copy, cases, print) == {"openvino bf16": passed}
    assert loaded == [{"engine": "openvino", "precision": "bf16"}]
