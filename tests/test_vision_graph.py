"""The vision tower's graph against Hugging Face: whole, with equal windows, and with uneven ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from export.vision_graph import VisionSizes, Windows, write_vision
from ppcr.errors import CheckpointError
from ppcr.images import patchify
from ppcr.tensors import TensorFiles


def tiny_model(window: int) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(3)
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 64, "vocab_size": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [8, 4, 4]},
            "bos_token_id": 0, "eos_token_id": 1,
        },
        vision_config={
            "depth": 3, "hidden_size": 48, "num_heads": 3, "intermediate_size": 80, "out_hidden_size": 64,
            "patch_size": 4, "window_size": window, "fullatt_block_indexes": [1],
        },
        image_token_id=2, video_token_id=3, vision_start_token_id=4, vision_end_token_id=5,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.model.visual.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("window", "image_size"),
    [(64, (32, 32)), (16, (32, 48)), (16, (40, 56)), (24, (8, 64))],
    ids=["whole", "equal-windows", "uneven-windows", "one-row"],
)
def test_features_equal_hugging_face(window: int, image_size: tuple[int, int], tmp_path: Path) -> None:
    model = tiny_model(window)
    model.save_pretrained(tmp_path)
    path = tmp_path / "vision.onnx"
    sizes = write_vision(model.config.to_dict(), TensorFiles(tmp_path), path, image_size=image_size)
    pixels = np.random.default_rng(0).standard_normal((3, *image_size)).astype(np.float32)
    patches = patchify(pixels, 4, 2, 2)
    assert patches.shape == (sizes.patches, sizes.patch_dim)
    with torch.no_grad():
        wanted = model.model.visual(torch.from_numpy(patches), grid_thw=torch.tensor([[1, *sizes.grid]]))
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(["image_features"], {"pixel_values": patches})
    assert got.shape == (sizes.tokens, 64)
    np.testing.assert_allclose(got, wanted.pooler_output.numpy(), atol=3e-5, rtol=1e-4)


def test_windows_cover_each_cell_once() -> None:
    model = tiny_model(16)
    windows = Windows.of(VisionSizes.from_config(model.config.to_dict(), (40, 56)))
    assert sorted(windows.order) == list(range(5 * 7))
    assert windows.sizes.sum() == 5 * 7
    assert not windows.equal and not windows.in_place


def test_half_precision_graph_stays_close(tmp_path: Path) -> None:
    model = tiny_model(64)
    model.save_pretrained(tmp_path)
    outputs = []
    for dtype, name in ((np.float32, "full"), (np.float16, "half")):
        path = tmp_path / f"{name}.onnx"
        write_vision(model.config.to_dict(), TensorFiles(tmp_path), path, image_size=(32, 32), dtype=dtype)
        patches = np.random.default_rng(1).standard_normal((64, 96)).astype(dtype)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, {"pixel_values": patches})[0].astype(np.float32))
    scale = np.abs(outputs[0]).mean()
    assert np.abs(outputs[1] - outputs[0]).mean() < 0.01 * scale


def test_impossible_image_size_is_refused(tmp_path: Path) -> None:
    config = tiny_model(64).config.to_dict()
    with pytest.raises(CheckpointError, match="multiple of 8"):
        VisionSizes.from_config(config, (32, 36))
    with pytest.raises(CheckpointError, match="does not describe"):
        VisionSizes.from_config({"vision_config": {}}, (32, 32))
