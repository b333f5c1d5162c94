"""Accuracy on photographs: the folder's layout, true boxes given, and what is wrong said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import accuracy, photos, segmenter
from benchmarks.systems import Answer
from ppcr.errors import UsageError
from ppcr.evaluation.metrics import DEFAULT, summarise
from ppcr.masks import encode_rle
from ppcr.prompts import SemanticPrompt, SpatialPrompt
from runtime.session import Prompts
from tests import factory

SIZES = {"b.png": (60, 90), "a.png": (120, 50)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, three expressions; masks fill their boxes."""
    (tmp_path / "images").mkdir()
    for seed, (name, (height, width)) in enumerate(SIZES.items()):
        Image.fromarray(factory.picture(seed, height, width)).save(tmp_path / "images" / name)
    entries = [
        entry("b.png", (10, 20, 50, 55)), entry("a.png", (0, 0, 50, 120)), entry("b.png", (3, 4, 20, 30)),
    ]  # fmt: skip
    (tmp_path / "triples.json").write_text(json.dumps(entries))
    return tmp_path


def entry(image: str, box: tuple[int, int, int, int]) -> dict[str, Any]:
    mask = np.zeros(SIZES[image], bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return {"image": image, "expression": "it", "box_xyxy": list(box), "mask_rle": encode_rle(mask)}


class BoxSystem:
    """Answers with the box itself, or with a part of it; counts the images it looked at."""

    name = "boxes"

    def __init__(self, share: float = 1.0) -> None:
        self.share, self.looked = share, 0

    def look(self, image: np.ndarray) -> BoxView:
        self.looked += 1
        return BoxView(image, self.share)


class BoxView:
    def __init__(self, image: np.ndarray, share: float) -> None:
        self.image, self.share = image, share

    def answer(self, expression: str, semantic: SemanticPrompt | None = None) -> Answer:
        none = SemanticPrompt.from_fields(["it", "", ""], 0)
        return Answer(none, SpatialPrompt.empty(), np.zeros(self.image.shape[:2], bool))

    def draw(self, semantic: SemanticPrompt | None, spatial: SpatialPrompt | None) -> np.ndarray:
        assert semantic is None and spatial is not None and spatial.count == 1
        height, width = self.image.shape[:2]
        x1, y1, x2, y2 = np.rint(spatial.boxes[0] * [width, height, width, height]).astype(int)
        mask = np.zeros((height, width), bool)
        mask[y1 : y1 + round(self.share * (y2 - y1)), x1:x2] = True
        return mask


def test_entries_of_an_image_lie_side_by_side(folder: Path) -> None:
    found = photos.read(folder)
    assert [photo.path.name for photo in found] == ["a.png", "b.png", "b.png"]
    assert found[0].box.tolist() == [0, 0, 50, 120]


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_true_boxes_are_given(folder: Path, share: float) -> None:
    system = BoxSystem(share)
    figures = summarise(photos.evaluate(system, photos.read(folder), DEFAULT, given="spatial"))
    assert system.looked == 2  # once for each image, not for each expression
    assert figures.n == 3 and figures.miou == pytest.approx(share, abs=0.02)
    assert figures.precision[0.5] == float(share > 0.5)


def test_without_boxes_all_stages_run(folder: Path) -> None:
    figures = summarise(photos.evaluate(BoxSystem(), photos.read(folder), DEFAULT, given=None))
    assert figures.miou == 0 and figures.none_false_rate == 1


def test_a_bundle_on_photographs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = factory.random_bundle()
    words = ["--bundle", str(bundle), "--photos", str(folder), "--given", "spatial", "--threads", "1"]
    assert accuracy.main(words) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["benchmark"] == "accuracy" and last["split"] == "photos" and last["given"] == "spatial"
    assert last["n"] == 3 and 0 <= last["miou"] <= 1
    assert sum(kind["n"] for kind in last["kinds"].values()) == 3


def test_reduced_precisions_may_differ_as_a_pixel_does() -> None:
    assert segmenter.least("fp32", 0.9) == 0.995 and segmenter.least("unheard of", 0.9) == 1
    assert segmenter.least("int8", 0.99) == 0.95 and segmenter.least("int8", 0.93) == 0.93


def test_boxes_move_by_a_pixel_at_most() -> None:
    boxes = np.random.default_rng().random((7, 4), np.float32)
    given = Prompts(
        boxes, boxes[:, :2], np.ones(7, np.float32), np.zeros((7, 1, 8), np.float32), np.zeros((7, 1), bool)
    )
    shift = (segmenter.moved(given, (50, 200)).boxes - boxes) * np.array([200, 50, 200, 50])
    assert np.abs(shift).max() <= 1.001 and np.abs(shift).min() > 0


def test_openvino_beside_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    words = ["--checkpoint", str(factory.random_checkpoint()), "--bundle", str(factory.random_bundle())]
    assert segmenter.main([*words, "--boxes", "3", "--repeats", "1", "--openvino"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert set(rows) - {"openvino bf16"} == {"torch", "fp32", "int8", "openvino fp32"}
    assert rows["openvino fp32"]["mean_mask_iou"] > 0.99


def test_the_segmenters_latency_beside_torch(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", str(factory.random_checkpoint()), "--bundle", str(factory.random_bundle())]
    assert segmenter.main([*words, "--boxes", "3", "--repeats", "2"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(last["rows"]) == {"torch", "fp32", "int8"}
    assert last["rows"]["torch"]["encode"]["speedup"] == 1
    assert last["rows"]["fp32"]["mean_mask_iou"] > 0.99
    assert last["rows"]["fp32"]["many boxes"]["n"] == 2
    assert last["factors_against"] == "torch"
    assert all(row["counts"] for row in last["rows"].values())  # int8 of this bundle is its fp32
    assert 0 < last["torch_with_boxes_moved_by_a_pixel"] <= 1
    assert segmenter.main([*words, "--official", "mobile_sam.pt"]) == UsageError.exit_code
    assert "belongs to a bundle of MobileSAM" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "holds no triples.json"),
        ("[", "cannot read"),
        ("[]", "is empty"),
        ('[{"image": "a.png"}]', "cannot read"),
        (json.dumps([{**entry("a.png", (0, 0, 9, 9)), "box_xyxy": [1, 2, 3]}]), "cannot read"),
        (json.dumps([{**entry("a.png", (0, 0, 9, 9)), "image": "c.png"}]), "c.png, which is not in images/"),
    ],
)
def test_a_folder_of_another_layout(folder: Path, text: str | None, told: str) -> None:
    (folder / "triples.json").unlink()
    if text is not None:
        (folder / "triples.json").write_text(text)
    with pytest.raises(UsageError, match=told):
        photos.read(folder)


@pytest.mark.parametrize("words", [["--given", "spatial"], ["--photos", "here", "--ablate"]])
def test_options_that_do_not_belong_together(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert accuracy.main(words) == UsageError.exit_code
    assert capsys.readouterr().err.count("\n") == 1
