"""Packing trained parts: fp16, on the int8 grid, readable by all, and refused where parts are missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ppcr.checkpoint import Checkpoint
from ppcr.errors import CheckpointError, OutputError
from ppcr.int8 import snap
from ppcr.model.reference import ReferencePipeline
from ppcr.training.package import CARD, main, package, size_mb
from tests.factory import picture, random_checkpoint


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = random_checkpoint(), tmp_path_factory.mktemp("pack") / "tiny"
    return package(source / "mllm", source / "segmenter", target, name="packed")


def test_weights_are_half_precision_and_on_the_grid(packed: Path) -> None:
    for part in ("mllm", "segmenter"):
        floating = [t.dtype for t in load_file(packed / part / "model.safetensors").values() if t.ndim]
        assert set(floating) == {torch.float16}
    checkpoint = Checkpoint.open(packed)
    name = "model.layers.0.mlp.down_proj.weight"
    weight, trained = checkpoint.mllm_tensors[name], Checkpoint.open(random_checkpoint()).mllm_tensors[name]
    np.testing.assert_array_equal(weight, snap(weight))
    assert not np.array_equal(trained, snap(trained))
    assert np.abs(weight - trained).max() < 0.01 * np.abs(trained).max()
    assert json.loads((packed / "mllm" / "config.json").read_text())["torch_dtype"] == "float16"


def test_configuration_follows_the_parts(packed: Path) -> None:
    config = Checkpoint.open(packed).config
    segmenter = json.loads((packed / "segmenter" / "config.json").read_text())
    assert config.name == "packed"
    assert list(config.segmenter.mean) == segmenter["pixel_mean"]
    assert list(config.segmenter.std) == segmenter["pixel_std"]
    assert config.mllm.image_tokens == 64


def test_everyone_may_read_it_and_it_answers(packed: Path) -> None:
    assert {oct(path.stat().st_mode & 0o777) for path in packed.rglob("*") if path.is_file()} == {"0o644"}
    assert size_mb(packed) < 40
    first = ReferencePipeline.load(packed).segment(picture(), "the red cube")
    again = ReferencePipeline.load(packed).segment(picture(), "the red cube")
    assert first.semantic_ids == again.semantic_ids and first.spatial_ids == again.spatial_ids
    assert len(first.spatial_ids) == 6 * first.semantic.count
    assert first.instances.shape == (first.semantic.count, 120, 160)


def test_card_is_kept_and_strangers_are_not_replaced(packed: Path, tmp_path: Path) -> None:
    target = shutil.copytree(packed, tmp_path / "tiny")
    (target / CARD).write_text("by hand")
    source = random_checkpoint()
    package(source / "mllm", source / "segmenter", target)
    assert (target / CARD).read_text() == "by hand"
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="will not replace"):
        package(source / "mllm", source / "segmenter", tmp_path / "letters")


def test_missing_parts_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = random_checkpoint(), tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"lacks config\.json"):
        package(tmp_path, source / "segmenter", output)
    words = ["--mllm", str(source / "mllm"), "--segmenter", str(tmp_path), "--output", str(output)]
    assert main(words) == CheckpointError.exit_code
    assert str(tmp_path) in capsys.readouterr().err
    assert not output.exists()


def test_weights_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    source = random_checkpoint()
    broken = shutil.copytree(source / "segmenter", tmp_path / "segmenter")
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    tensors[name][0, 0] = 1e6
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit fp16"):
        package(source / "mllm", broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()
