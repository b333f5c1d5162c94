"""A checkpoint around a hub directory, built by the command and run end to end against the reference."""

from __future__ import annotations

import errno
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export import pretrained_bundle
from export.build_engines import main
from export.bundle import GRAPHS
from export.external import ExternalData
from ppcr.boxes import iou
from ppcr.checkpoint import Checkpoint
from ppcr.config import PPCRConfig
from ppcr.errors import CheckpointError, EngineError, OutputError, UsageError
from ppcr.files import write_json
from ppcr.framing import Framing
from ppcr.manifest import Manifest
from ppcr.model.reference import ReferencePipeline
from ppcr.pretrained import mllm_config
from ppcr.prompts import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START
from ppcr.zero_shot import CONVENTIONS
from runtime.bundle import Bundle
from runtime.pipeline import Pipeline
from tests import factory
from tests.families import Small, save

SIZES = {"qwen2_5_vl": ((112, 112), (84, 168)), "qwen3_vl": ((128, 128), (96, 160))}
# The short vocabulary of the tests spells the instructions almost letter by letter.
MAX_LENGTH = 1400


def make_checkpoint(family: str, root: Path) -> Path:
    """A checkpoint whose mllm/ is as transformers saves it, in shards, beside a tiny segmenter."""
    tokenizer = factory.tokenizer().tokenizer
    tokens = {
        "image_token_id": IMAGE_PAD, "video_token_id": VIDEO_PAD,
        "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
    }  # fmt: skip
    vocabulary = -(-tokenizer.get_vocab_size(with_added_tokens=True) // 64) * 64
    model = Small(
        family, hidden=256, intermediate=256, heads=4, head_dim=64, vocabulary=vocabulary, window=56,
        tokens={name: tokenizer.token_to_id(token) or 0 for name, token in tokens.items()},
    ).build(seed=11)  # fmt: skip
    with torch.no_grad():
        # Untrained logits lie so close together that rounding could decide; these do not.
        model.model.language_model.norm.weight.mul_(8.0)
    save(model, root / "mllm", shard="3MB")
    tokenizer.save(str(root / "mllm" / "tokenizer.json"))
    shutil.copytree(factory.random_checkpoint() / "segmenter", root / "segmenter")
    sizes = SIZES[family]
    said = replace(mllm_config(root / "mllm"), image_size=sizes[0], resolutions=sizes, max_length=MAX_LENGTH)
    config = PPCRConfig(name="public", box_convention=CONVENTIONS[family], mllm=said)
    write_json(root / "config.json", config.to_dict())
    return root


@pytest.fixture(scope="module", params=CONVENTIONS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Checkpoint and bundle; the segmenter's graphs come from the session's bundle."""
    root = tmp_path_factory.mktemp(request.param)
    checkpoint, bundle = make_checkpoint(request.param, root / "checkpoint"), root / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        for role in ("image_encoder", "mask_decoder"):
            source = factory.random_bundle() / GRAPHS[role]
            patch.setattr(
                pretrained_bundle, f"write_{role}", lambda _, path, source=source: shutil.copy(source, path)
            )
        options = ["--checkpoint", str(checkpoint), "--output", str(bundle)]
        assert main([*options, "--precision", "fp32,fp16,int4", "--no-parity"]) == 0
    return checkpoint, bundle


@pytest.fixture(scope="module")
def reference(built: tuple[Path, Path]) -> ReferencePipeline:
    return ReferencePipeline.load(built[0])


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("shape", [(120, 120), (90, 200)], ids=["square", "wide"])
def test_answers_equal_the_reference(
    built: tuple[Path, Path], reference: ReferencePipeline, shape: tuple[int, int], engine: str
) -> None:
    pytest.importorskip(engine, reason=f"{engine} is not installed")
    image = factory.picture(1, *shape)
    with Pipeline.load(built[1], engine=engine, precision="fp32", threads=1) as pipeline:
        scene = pipeline.open(image)
        for expression in ("the small red cube", "all green cones left of the yellow cube"):
            wanted, got = reference.segment(image, expression), scene.segment(expression)
            assert got.semantic == wanted.semantic
            np.testing.assert_allclose(got.spatial.boxes, wanted.spatial.boxes, atol=1e-6)
            np.testing.assert_array_equal(got.instances.shape, wanted.instances.shape)
            if wanted.spatial.count:
                assert (got.instances == wanted.instances).mean() > 0.999


def test_second_stage_goes_on_from_a_given_first(
    built: tuple[Path, Path], reference: ReferencePipeline
) -> None:
    """Two boxes, in original pixels, the same as the stock model's own."""
    image, expression = factory.picture(2, 100, 210), "the cubes"
    semantic = "cube; red; any; two"
    tokenizer, config = reference.tokenizer, reference.config.mllm
    with Pipeline.load(built[1], precision="fp32", threads=1) as pipeline:
        result = pipeline.open(image).segment(expression, semantic=semantic)
    size = SIZES[config.family][1]
    rows, columns = config.grid_of(size)
    ids = [*tokenizer.prefix(rows * columns), *tokenizer.expression(expression), *tokenizer.encode(semantic)]
    patches, _ = reference._inputs(image, size, Framing.of((100, 210), reference.config.segmenter))
    asked = [*ids, *tokenizer.between_stages]
    answer = reference.generate(asked, patches, tokenizer.spatial_constraint(2), size=size)
    told = tokenizer.spatial(answer, size)
    assert told.count == 2
    # Random weights may tell one box twice.
    wanted = told.distinct().boxes * np.array([210, 100, 210, 100])
    np.testing.assert_allclose(result.boxes, wanted, atol=1e-3)
    assert result.instances.shape == (len(wanted), 100, 210)


def test_other_formats_run(built: tuple[Path, Path]) -> None:
    image, boxes = factory.picture(3, 100, 100), []
    for precision in ("fp32", "fp16", "int4"):
        with Pipeline.load(built[1], precision=precision, threads=1) as pipeline:
            result = pipeline.open(image).segment("the cube", semantic="cube; any; any; one")
            boxes.append(result.spatial.boxes)
            assert result.engine["precision"] == precision
    assert all(box.shape == (1, 4) for box in boxes)
    assert iou(boxes[0], boxes[1])[0] >= 0


def test_manifest_declares_what_there_is(built: tuple[Path, Path]) -> None:
    checkpoint, folder = built
    manifest = Manifest.load(folder)
    manifest.verify(folder)
    family = Checkpoint.open(checkpoint).config.mllm.family
    assert manifest.box_convention == CONVENTIONS[family]
    assert manifest.shapes.deepstack == (2 if family == "qwen3_vl" else 0)
    assert set(manifest.precisions) == {"fp32", "fp16", "int4"}
    further = "x".join(map(str, SIZES[family][1]))
    for precision, roles in manifest.precisions.items():
        assert f"vision_{further}" in roles
        assert all((folder / name).is_file() for name in roles.values()), precision
    # int4 has the vision tower in int8, and each file is declared: loading checks its hash.
    int4 = manifest.paths("int4")
    assert int4["vision"] == "mllm/vision.int8.onnx"
    data = folder / int4["decoder_weights"]
    raw = bytearray(data.read_bytes())
    try:
        data.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        with pytest.raises(Exception, match=r"decoder\.int4\.onnx\.data is not the file"):
            Bundle.load(folder, precision="int4")
    finally:
        data.write_bytes(raw)


def test_bfloat16_is_written_and_refused_in_one_line(built: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for role in ("image_encoder", "mask_decoder"):
            source = built[1] / GRAPHS[role]
            patch.setattr(
                pretrained_bundle, f"write_{role}", lambda _, path, source=source: shutil.copy(source, path)
            )
        options = ["--checkpoint", str(built[0]), "--output", str(tmp_path / "bf16")]
        assert main([*options, "--precision", "bf16", "--no-parity"]) == 0
    with pytest.raises(EngineError, match="cannot run"):
        Pipeline.load(tmp_path / "bf16", precision="bf16", threads=1)


def test_a_disk_that_is_full_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = make_checkpoint("qwen2_5_vl", tmp_path / "checkpoint")
    add, left = ExternalData.add, iter(range(9))

    def until_full(self: ExternalData, *arguments: Any) -> Any:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return add(self, *arguments)

    monkeypatch.setattr(ExternalData, "add", until_full)
    options = ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), "--no-parity"]
    assert main([*options, "--precision", "fp16"]) == OutputError.exit_code
    said = capsys.readouterr().err
    assert "the disk is full; free some space" in said.splitlines()[-1]
    assert next(left, None) is None and list(tmp_path.iterdir()) == [checkpoint]


def test_checkpoints_that_cannot_be(
    built: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(checkpoint: Path, *options: str) -> tuple[int, str]:
        code = main(["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), *options])
        return code, capsys.readouterr().err

    tiny = build(factory.random_checkpoint(), "--precision", "int4")
    assert tiny[0] == UsageError.exit_code and "not as int4" in tiny[1]
    lacking: Any = shutil.copytree(built[0], tmp_path / "lacking")
    sorted((lacking / "mllm").glob("*.safetensors"))[0].unlink()
    code, said = build(lacking)
    assert code == CheckpointError.exit_code and "is missing: copy the whole checkpoint" in said
    assert not (tmp_path / "out").exists()
