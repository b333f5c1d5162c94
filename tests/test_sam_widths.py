"""SAM and SAM 2 at the widths of the published models, with fewer layers: masks against transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.segmenter_graph import write_image_encoder, write_mask_decoder
from ppcr.model.sam_import import TextPath, load_transformers
from runtime.onnxruntime_segmenter import OnnxSegmenter
from runtime.session import Prompts
from tests import sam_factory as factory

SIDE, TEXT = 128, 8
_PROMPTS = {"hidden_size": 256, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 16}
_DECODER = {"hidden_size": 256, "mlp_dim": 2048, "num_attention_heads": 8, "iou_head_hidden_dim": 256}
VIT = {"vit-b": (768, 12), "vit-l": (1024, 16), "vit-h": (1280, 16)}
"""Width and heads."""
HIERA = {
    "hiera-tiny": (96, 1, (8, 4, 14, 7), (7, 7)),
    "hiera-base-plus": (112, 2, (8, 4, 14, 7), (14, 14)),
    "hiera-large": (144, 2, (8, 4, 16, 8), (7, 7)),
}
"""Width and heads of the first stage (later ones twice as many each), windows, background of positions."""


def published(name: str) -> dict[str, Any]:
    """config.json of a published size with one layer of each kind, for images of `SIDE`."""
    rest = {"prompt_encoder_config": _PROMPTS, "mask_decoder_config": _DECODER}
    if name in VIT:
        width, heads = VIT[name]
        vision: dict[str, Any] = {
            "hidden_size": width, "num_attention_heads": heads, "mlp_dim": 4 * width, "num_hidden_layers": 2,
            "global_attn_indexes": [1], "window_size": 14, "image_size": SIDE, "patch_size": 16,
            "output_channels": 256, "num_pos_feats": 128,
        }  # fmt: skip
        return {"model_type": "sam", "vision_config": vision, **rest}
    width, heads, windows, background = HIERA[name]
    dims = [width << stage for stage in range(4)]
    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": width, "num_attention_heads": heads,
        "image_size": [SIDE, SIDE], "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": dims,
        "num_attention_heads_per_stage": [heads << stage for stage in range(4)],
        "window_size_per_stage": list(windows), "global_attention_blocks": [3],
        "window_positional_embedding_background_size": list(background),
    }  # fmt: skip
    vision = {
        "model_type": "sam2_vision_model", "fpn_hidden_size": 256, "backbone_channel_list": dims[::-1],
        "backbone_feature_sizes": [[SIDE // side] * 2 for side in (4, 8, 16)], "backbone_config": backbone,
    }  # fmt: skip
    return {"model_type": "sam2", "vision_config": vision, **rest}


@pytest.mark.parametrize("name", [*VIT, *HIERA])
@torch.no_grad()
def test_masks_equal_transformers(name: str, tmp_path: Path) -> None:
    public = factory.public_model(published(name), seed=len(name))
    segmenter = load_transformers(factory.save_public(public, tmp_path / "public"), TextPath(TEXT))
    pixels, corners = torch.randn(1, 3, SIDE, SIDE), torch.rand(3, 2, 2).sort(dim=1).values.flatten(1)
    wanted = public(pixel_values=pixels, input_boxes=corners[None] * SIDE, multimask_output=False)
    masks, scores = wanted.pred_masks[0, :, 0], wanted.iou_scores[0, :, 0].clamp(0, 1)
    given = (
        corners, torch.rand(3, 2), torch.ones(3), torch.randn(3, 4, TEXT), torch.ones(3, 4, dtype=torch.bool)
    )  # fmt: skip
    found, found_scores = segmenter.decode(segmenter.encode(pixels), *given)
    scale = float(masks.abs().max())
    assert scale > 0.1
    torch.testing.assert_close(found, masks, atol=5e-5 * scale, rtol=1e-4)
    torch.testing.assert_close(found_scores, scores, atol=1e-4, rtol=0)
    if os.environ.get("PPCR_TRUE_WIDTH"):  # takes minutes
        exported = _exported(segmenter, tmp_path)
        fed = Prompts(*(part.numpy() for part in given))
        drawn, _ = exported.decode(exported.encode(pixels[0].numpy()), fed)
        np.testing.assert_allclose(drawn, masks.numpy(), atol=1e-4 * scale, rtol=1e-4)


def _exported(segmenter: Any, folder: Path) -> OnnxSegmenter:
    ort = pytest.importorskip("onnxruntime")
    paths = folder / "image_encoder.onnx", folder / "mask_decoder.onnx"
    write_image_encoder(segmenter, paths[0])
    write_mask_decoder(segmenter, paths[1])
    return OnnxSegmenter(*(ort.InferenceSession(p, providers=["CPUExecutionProvider"]) for p in paths))
