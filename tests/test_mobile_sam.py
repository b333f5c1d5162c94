"""The official MobileSAM weights on photographs: the official model's masks, in torch and as exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.segmenter_graph import write_image_encoder, write_mask_decoder
from ppcr import boxes, images, masks
from ppcr.compose import fed_with
from ppcr.framing import Framing
from ppcr.model.sam import SamSegmenter
from ppcr.model.sam_import import TextPath, load_mobile_sam
from runtime.session import Prompts

TEXT = 8
OFFICIAL = json.loads((Path(__file__).parent / "mobile_sam_official.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def segmenter(weights: Path) -> SamSegmenter:
    return load_mobile_sam(weights / "mobile_sam.pt", TextPath(text_dim=TEXT))


@pytest.fixture(scope="module", params=OFFICIAL["cases"], ids=lambda case: case["image"])
def case(request: pytest.FixtureRequest, photos: Path, segmenter: SamSegmenter) -> dict[str, Any]:
    """What the official model answered to one photograph and box; the input, and torch's own answer."""
    recorded = request.param
    image = images.load_image(photos / "images" / recorded["image"])
    framing = Framing.of((image.shape[0], image.shape[1]), fed_with(segmenter))
    unit = boxes.to_unit(recorded["box_xyxy"], image.shape[1], image.shape[0])[None]
    prompts = Prompts(
        framing.place(unit),
        np.zeros((1, 2), np.float32),
        np.ones(1, np.float32),
        np.zeros((1, 1, TEXT), np.float32),
        np.zeros((1, 1), np.bool_),
    )
    pixels = framing.pixels(image)
    with torch.no_grad():
        features = segmenter.encode(torch.from_numpy(pixels)[None])
        given = (torch.from_numpy(part) for part in vars(prompts).values())
        logits, scores = segmenter.decode(features, *given)
    answer = {"pixels": pixels, "prompts": prompts, "logits": logits[0].numpy(), "score": float(scores[0])}
    return {**recorded, "official_score": recorded["score"], "framing": framing, **answer}


def test_masks_of_the_official_model(case: dict[str, Any]) -> None:
    official = masks.decode_rle(case["mask_rle"])
    assert masks.iou(case["framing"].mask(case["logits"]), official) > 0.999
    assert case["score"] == pytest.approx(case["official_score"], abs=1e-4)


def test_exported_weights_draw_the_same(
    segmenter: SamSegmenter, case: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    ort = pytest.importorskip("onnxruntime")
    from runtime.onnxruntime_segmenter import OnnxSegmenter

    folder = tmp_path_factory.getbasetemp() / "mobile_sam"
    if not folder.is_dir():
        folder.mkdir()
        write_image_encoder(segmenter, folder / "image_encoder.onnx")
        write_mask_decoder(segmenter, folder / "mask_decoder.onnx")
    opened = (
        ort.InferenceSession(folder / f"{role}.onnx", providers=["CPUExecutionProvider"])
        for role in ("image_encoder", "mask_decoder")
    )
    session = OnnxSegmenter(*opened)
    logits, scores = session.decode(session.encode(case["pixels"]), case["prompts"])
    np.testing.assert_allclose(logits[0], case["logits"], atol=5e-3)
    assert scores[0] == pytest.approx(case["score"], abs=1e-4)
