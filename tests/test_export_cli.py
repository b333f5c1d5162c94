"""The build command: refusals with their exit codes, nothing left behind, and no work done twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from export import bundle as bundle_module
from export.build_engines import main
from ppcr.checkpoint import Checkpoint
from ppcr.errors import BundleError, CheckpointError, OutputError, ParityError
from ppcr.manifest import EMBEDDING, MANIFEST, Manifest
from ppcr.tensors import TensorFiles
from ppcr.training.package import package
from tests.factory import random_bundle, random_checkpoint

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--precision", "fp32", "--parity-scenes", "2"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the segmenter's graphs from the session's bundle instead of exporting them again."""

    def copy(role: str) -> Any:
        return lambda _, path: shutil.copyfile(random_bundle() / bundle_module.GRAPHS[role], path)

    monkeypatch.setattr(bundle_module, "write_image_encoder", copy("image_encoder"))
    monkeypatch.setattr(bundle_module, "write_mask_decoder", copy("mask_decoder"))


@pytest.fixture
def output(tmp_path: Path) -> Iterator[Path]:
    """A place in a folder of its own, which holds the bundle or nothing when the test ends."""
    place = tmp_path / "bundles" / "tiny"
    yield place
    left = list(place.parent.iterdir()) if place.parent.exists() else []
    assert left in ([], [place])


def build(output: Path, *options: str, checkpoint: Path | None = None) -> int:
    source = str(checkpoint or random_checkpoint())
    return main(["--checkpoint", source, "--output", str(output), *QUICK, *options])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the error, whatever progress was shown before it."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def disturb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the exporter write a decoder that differs from the checkpoint."""
    write = bundle_module.write_decoder

    def wrong(config: Any, tensors: TensorFiles, path: Path, **options: Any) -> Any:
        changed = {name: np.array(value) for name, value in tensors.items()}
        for name, value in changed.items():
            if name.endswith("down_proj.weight"):
                changed[name] = value[::-1]
        folder = path.parent / "changed"
        folder.mkdir()
        try:
            save_file({k: np.ascontiguousarray(v) for k, v in changed.items()}, folder / "model.safetensors")
            return write(config, TensorFiles(folder), path, **options)
        finally:
            shutil.rmtree(folder)

    monkeypatch.setattr(bundle_module, "write_decoder", wrong)


def test_bundle_is_whole_and_built_once(
    quick: None, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(output) == 0
    said = capsys.readouterr().out
    assert "mllm/decoder.onnx" in said and "passed" in said and str(output) in said
    manifest = Manifest.load(output)
    manifest.verify(output)
    assert manifest.source == Checkpoint.open(random_checkpoint()).source_hash()
    assert manifest.parity["fp32"].scenes == 2
    assert manifest.parity["fp32"].identical_tokens == 1.0
    assert not manifest.parity_failure_allowed
    table = load_file(output / EMBEDDING)["weight"]
    np.testing.assert_array_equal(table, Checkpoint.open(random_checkpoint()).embedding())

    made = (output / MANIFEST).stat().st_mtime_ns
    assert build(output) == 0
    assert "up to date" in capsys.readouterr().out
    assert (output / MANIFEST).stat().st_mtime_ns == made

    graph = output / "mllm" / "vision.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    assert build(output) == 0
    Manifest.load(output).verify(output)


def test_gate_refuses_a_wrong_engine(
    quick: None, output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disturb(monkeypatch)
    assert build(output) == ParityError.exit_code
    message = error_of(capsys)
    assert "fp32: " in message and "gate 99.0%" in message and "--allow-parity-failure" in message
    assert not output.exists()

    assert build(output, "--allow-parity-failure") == 0
    manifest = Manifest.load(output)
    assert manifest.parity_failure_allowed
    assert not manifest.parity["fp32"].passed
    # Not what a build without the permission would have written: it is not "up to date" then.
    assert build(output) == ParityError.exit_code
    assert Manifest.load(output) == manifest


def test_bad_checkpoints(tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(output, checkpoint=tmp_path / "nowhere") == CheckpointError.exit_code
    assert "does not exist" in error_of(capsys)
    broken = shutil.copytree(random_checkpoint(), tmp_path / "broken")
    weights = broken / "mllm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert build(output, checkpoint=broken) == CheckpointError.exit_code
    assert "cut short" in error_of(capsys)


def test_checkpoint_whose_parts_do_not_fit(
    tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = shutil.copytree(random_checkpoint(), tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    config["mllm"]["patch"] = 16
    (odd / "config.json").write_text(json.dumps(config))
    assert build(output, checkpoint=odd) == CheckpointError.exit_code
    assert "other sizes" in error_of(capsys)


def test_unwritable_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert build(tmp_path / "file") == OutputError.exit_code
    assert "it is a file" in error_of(capsys)
    assert build(tmp_path / "file" / "below") == OutputError.exit_code
    assert "cannot write" in error_of(capsys)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letters.txt").write_text("mine")
    assert build(tmp_path / "taken") == OutputError.exit_code
    assert "will not replace" in error_of(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
    assert (tmp_path / "taken" / "letters.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "words", [["--precision", "fp8"], ["--parity-scenes", "0"], ["--parity-scenes", "x"], ["--speed"]]
)
def test_wrong_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "--help shows the options" in error_of(capsys)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_build_leaves_nothing(output: Path, number: signal.Signals) -> None:
    command = [sys.executable, "export/build_engines.py", "--checkpoint", str(random_checkpoint())]
    process = subprocess.Popen(
        [*command, "--output", str(output), *QUICK], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline and process.poll() is None:
            if list(output.parent.glob(".tiny*/mllm/*.onnx")):
                break
            time.sleep(0.02)
        assert process.poll() is None, "the build ended before it could be interrupted"
        os.kill(process.pid, number)
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], error
    assert "Traceback" not in error
    assert not output.parent.exists() or not list(output.parent.iterdir())


def test_bundle_of_another_checkpoint_is_replaced(
    quick: None, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = package(random_checkpoint() / "mllm", random_checkpoint() / "segmenter", tmp_path / "packed")
    assert build(output) == 0
    assert build(output, "--allow-parity-failure", checkpoint=packed) == 0
    assert "up to date" not in capsys.readouterr().out
    assert Manifest.load(output).source == Checkpoint.open(packed).source_hash()
    with pytest.raises(BundleError, match="int8"):
        Manifest.load(output).paths("int8")
