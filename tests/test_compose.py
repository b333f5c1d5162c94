"""Public weights to a checkpoint: whole, equal to what it was made of, or nothing and one line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ppcr import compose
from ppcr.checkpoint import Checkpoint
from ppcr.errors import CheckpointError, OutputError
from ppcr.framing import Framing
from ppcr.model.segmenters import load_segmenter
from ppcr.prompts import SemanticPrompt, SpatialPrompt
from ppcr.zero_shot import CONVENTIONS
from tests import sam_factory as factory
from tests.factory import picture, tokenizer
from tests.families import Small, save


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    public = factory.public_model(factory.SAM, seed=31)
    return factory.save_public(public, tmp_path_factory.mktemp("sam"))


@pytest.fixture(scope="module")
def composed(sam: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("composed") / "tiny-sam"
    words = ["--mllm", str(checkpoint / "mllm"), "--segmenter", str(sam), "--output", str(target)]
    assert compose.main(words) == 0
    return target


def test_a_checkpoint_of_two_sources(composed: Path, checkpoint: Path) -> None:
    made, shipped = Checkpoint.open(composed), Checkpoint.open(checkpoint)
    assert made.config.name == "tiny-sam" and made.config.mllm == shipped.config.mllm
    assert made.config.segmenter.family == "sam" and made.config.segmenter.fit == "pad"
    assert made.config.segmenter.image_size == (factory.SIDE, factory.SIDE)
    for path in (checkpoint / "mllm").iterdir():
        assert (composed / "mllm" / path.name).read_bytes() == path.read_bytes()
    segmenter = load_segmenter(made.segmenter)
    assert segmenter.config.text_dim == made.embedding().shape[1]
    assert "boxes alone" in (composed / "MODEL_CARD.md").read_text()


def test_composing_again_gives_the_same_and_replaces(composed: Path, sam: Path, checkpoint: Path) -> None:
    before = Checkpoint.open(composed).source_hash()
    words = ["--mllm", str(checkpoint / "mllm"), "--segmenter", str(sam), "--output", str(composed)]
    assert compose.main(words) == 0
    assert Checkpoint.open(composed).source_hash() == before


@torch.no_grad()
def test_the_reference_draws_what_the_public_model_draws(composed: Path, sam: Path) -> None:
    from transformers import SamModel

    from ppcr.model.reference import ReferencePipeline

    pipeline = ReferencePipeline.load(composed)
    image = picture(4, 90, 130)
    framing = Framing.of((90, 130), pipeline.config.segmenter)
    unit = np.array([[0.1, 0.2, 0.6, 0.9], [0.3, 0.0, 1.0, 0.5]], np.float32)
    spatial = SpatialPrompt(unit, (unit[:, :2] + unit[:, 2:]) / 2)
    pixels = torch.from_numpy(framing.pixels(image))[None]
    features = pipeline.segmenter.encode(pixels)
    semantic = SemanticPrompt.parse("sphere; red; left of cube; two")
    logits, _ = pipeline.decode(features, semantic, spatial, framing)
    public = SamModel.from_pretrained(sam).eval()
    # 90 x 130 scaled to 44 x 64 of the 64 x 64 input.
    boxes = torch.from_numpy(unit * np.array([64, 44, 64, 44], np.float32))[None]
    wanted = public(pixel_values=pixels, input_boxes=boxes, multimask_output=False).pred_masks[0, :, 0]
    np.testing.assert_allclose(logits, wanted.numpy(), atol=2e-5 * float(wanted.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("family", CONVENTIONS)
def test_a_public_mllm_is_spoken_to_in_its_own_convention(family: str, sam: Path, tmp_path: Path) -> None:
    save(Small(family).build(), tmp_path / "public")
    tokenizer().tokenizer.save(str(tmp_path / "public" / "tokenizer.json"))
    words = ["--mllm", str(tmp_path / "public"), "--segmenter", str(sam), "--output", str(tmp_path / "out")]
    assert compose.main(words) == 0
    made = Checkpoint.open(tmp_path / "out")
    assert made.config.box_convention == CONVENTIONS[family]
    assert made.config.mllm.family == family and made.config.mllm.resample == "bicubic"
    assert load_segmenter(made.segmenter).config.text_dim == Small(family).hidden


def told(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def damage(mllm: Path, target: Path) -> None:
    """Copies of an MLLM (beside which lies no PPCR checkpoint's config.json) that are not whole."""
    for name in ("no-shard", "cut", "no-tokenizer"):
        shutil.copytree(mllm, target / name, copy_function=os.symlink)
        config = json.loads((mllm / "config.json").read_text())
        config["vision_config"]["patch_size"] = 14  # a public model's
        (target / name / "config.json").unlink()
        (target / name / "config.json").write_text(json.dumps(config))
    (target / "no-tokenizer" / "tokenizer.json").unlink()
    weights = (target / "cut" / "model.safetensors").read_bytes()
    (target / "cut" / "model.safetensors").unlink()
    (target / "cut" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    (target / "no-shard" / "model.safetensors").rename(target / "no-shard" / first)
    index = {"weight_map": {"a": first, "b": second}}
    (target / "no-shard" / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("mllm", "segmenter", "message"),
    [
        ("absent", "sam", "absent does not exist"),
        ("empty", "sam", "holds no config.json"),
        ("foreign", "sam", "holds a model of type 'llama'"),
        ("no-shard", "sam", "no-shard/model-00002-of-00002.safetensors is missing"),
        ("cut", "sam", "cut/model.safetensors as safetensors"),
        ("no-tokenizer", "sam", "no-tokenizer holds no tokenizer.json"),
        ("tiny", "absent.pt", "absent.pt does not exist"),
        ("tiny", "empty", "holds no config.json"),
        ("tiny", "foreign", "holds a 'llama', which is no segmenter known here"),
        ("tiny", "noise.pt", "is not a plain state dict"),
        ("tiny", "no-weights", "model.safetensors is missing"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    sam: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mllm: str,
    segmenter: str,
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "no-weights").mkdir()
    shutil.copy(sam / "config.json", tmp_path / "no-weights")
    damage(checkpoint / "mllm", tmp_path)
    known = {"tiny": checkpoint / "mllm", "sam": sam}
    paths = [str(known.get(name, tmp_path / name)) for name in (mllm, segmenter)]
    before = sorted(tmp_path.iterdir())
    words = ["--mllm", paths[0], "--segmenter", paths[1], "--output", str(tmp_path / "out")]
    assert compose.main(words) == CheckpointError.exit_code
    assert message in told(capsys)
    assert sorted(tmp_path.iterdir()) == before


def test_a_name_on_the_hub_without_network(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    words = ["--mllm", str(checkpoint / "mllm"), "--output", str(tmp_path / "out")]
    assert compose.main([*words, "--segmenter", "nobody/no-such-sam"]) == CheckpointError.exit_code
    assert "nobody/no-such-sam is no path here and cannot be downloaded" in told(capsys)
    assert not (tmp_path / "out").exists()


def test_other_peoples_folders_are_not_replaced(
    sam: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"mine": 1}))
    words = ["--mllm", str(checkpoint / "mllm"), "--segmenter", str(sam), "--output", str(tmp_path)]
    assert compose.main(words) == OutputError.exit_code
    assert "will not replace" in told(capsys)
    assert json.loads((tmp_path / "config.json").read_text()) == {"mine": 1}


def test_a_full_disk_leaves_nothing(
    sam: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import errno

    import ppcr.model.segmenter_files as module

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    words = ["--mllm", str(checkpoint / "mllm"), "--segmenter", str(sam), "--output", str(tmp_path / "out")]
    assert compose.main(words) == OutputError.exit_code
    assert "full" in told(capsys) or "space" in told(capsys)
    assert not any(tmp_path.iterdir())
