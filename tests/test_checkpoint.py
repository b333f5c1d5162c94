"""Checkpoint directories: whole ones open, others say what is wrong; tensors of any type without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ppcr.checkpoint import Checkpoint
from ppcr.errors import CheckpointError
from ppcr.tensors import TensorFiles

TENSORS = {
    "bf16": torch.randn(3, 5).bfloat16(),
    "fp16": torch.randn(2, 2, 2).half(),
    "fp32": torch.randn(7),
    "int64": torch.arange(4),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def make_checkpoint(root: Path) -> Path:
    """The smallest directory that has every part; its weights are not those of any model."""
    (root / "mllm").mkdir(parents=True)
    (root / "segmenter").mkdir()
    (root / "config.json").write_text(json.dumps({"format": 1, "mllm": {}, "segmenter": {}}))
    (root / "mllm" / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    (root / "mllm" / "tokenizer.json").write_text("{}")
    (root / "segmenter" / "config.json").write_text("{}")
    table = torch.arange(12.0).view(4, 3)
    save_file({"model.embed_tokens.weight": table.half()}, root / "mllm" / "model.safetensors")
    save_file({"x": torch.ones(1)}, root / "segmenter" / "model.safetensors")
    return root


def test_tensors_of_every_type_equal_torch(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    tensors = TensorFiles(tmp_path)
    assert set(tensors) == set(TENSORS)
    for name, wanted in TENSORS.items():
        value = wanted.float() if wanted.is_floating_point() else wanted
        np.testing.assert_array_equal(tensors[name], value.numpy(), strict=True)


def test_tensors_of_several_files_with_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = TensorFiles(tmp_path)
    assert sorted(tensors) == ["a", "b"]
    assert tensors.find("absent", "b").shape == (3,)
    with pytest.raises(CheckpointError, match="no tensor absent"):
        tensors.find("absent")
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors is missing"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 12, -1])
def test_file_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="model"):
        TensorFiles(tmp_path)


def test_whole_checkpoint_opens(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "whole")
    checkpoint = Checkpoint.open(root)
    np.testing.assert_array_equal(checkpoint.embedding(), np.arange(12, dtype=np.float32).reshape(4, 3))
    before = checkpoint.source_hash()
    copy = shutil.copytree(root, tmp_path / "copy")
    assert Checkpoint.open(copy).source_hash() == before
    (copy / "MODEL_CARD.md").write_text("other")
    assert Checkpoint.open(copy).source_hash() != before


@pytest.mark.parametrize(
    "missing",
    ["config.json", "mllm/config.json", "mllm/tokenizer.json", "mllm/model.safetensors",
     "segmenter/config.json", "segmenter/model.safetensors"],
)  # fmt: skip
def test_missing_part_is_named(tmp_path: Path, missing: str) -> None:
    root = make_checkpoint(tmp_path / "checkpoint")
    (root / missing).unlink()
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        Checkpoint.open(root)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", '{"format": 7}', "format 7"),
        ("config.json", "[]", "not a JSON object"),
        ("config.json", '{"format": 1, "mllm": [], "segmenter": {}}', "does not fit"),
        ("config.json", '{"format": 1, "mllm": {"patch": "8"}, "segmenter": {}}', "patch is '8'"),
        ("config.json", '{"format": 1, "mllm": {"mean": [0.5, 0.5]}, "segmenter": {}}', "3 numbers"),
        ("config.json", '{"format": 1, "mllm": {}, "segmenter": {"image_size": 256}}', "image_size is 256"),
        ("config.json", '{"format": 1, "mllm": {}, "segmenter": {}, "name": 3}', "name is 3"),
        ("mllm/config.json", "{", "cannot read"),
        ("mllm/config.json", '{"model_type": "llava"}', "llava"),
    ],
)
def test_part_of_another_kind_is_refused(tmp_path: Path, file: str, content: str, said: str) -> None:
    root = make_checkpoint(tmp_path / "checkpoint")
    (root / file).write_text(content)
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(root)


def test_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoint.open(tmp_path / "file")
