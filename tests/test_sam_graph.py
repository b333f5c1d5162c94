"""Graphs of the SAM family against torch: any batch of images, any number of prompts and length of text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from export import segmenter_graph
from export.precision import quantise
from export.segmenter_graph import OUTPUTS, PROMPTS, write_image_encoder, write_mask_decoder
from ppcr.model.sam import SamSegmenter
from ppcr.model.sam_import import TextPath, assemble, load_transformers
from ppcr.model.sam_weights import from_official
from runtime import onnxruntime_segmenter
from runtime.onnxruntime_segmenter import OnnxSegmenter
from runtime.session import Prompts
from tests import sam_factory as factory
from tests.sam_factory import SIDE, TEXT

FAMILIES = ("mobile_sam", "sam", "sam2")


@dataclass
class Exported:
    """A segmenter and the folder of its graphs."""

    segmenter: SamSegmenter
    folder: Path

    def session(self, name: str) -> ort.InferenceSession:
        return ort.InferenceSession(self.folder / f"{name}.onnx", providers=["CPUExecutionProvider"])


def segmenter_of(family: str, folder: Path) -> SamSegmenter:
    values = factory.SAM2 if family == "sam2" else factory.SAM
    public = factory.public_model(values, seed=21)
    if family == "mobile_sam":
        state = from_official(factory.mobile_sam_state(public, seed=4))
        made = assemble(factory.mobile_sam_config(points=True), state, 0, folder)
    else:
        made = load_transformers(factory.save_public(public, folder / "public"), TextPath(TEXT, max_text=16))
    # As after training: an untrained path for text would hide a mistake in its graph.
    with torch.no_grad():
        made.mask_decoder.semantic.attention.out.weight.normal_(0, 0.3)
    return made


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    segmenter = segmenter_of(request.param, folder)
    write_image_encoder(segmenter, folder / "image_encoder.onnx")
    write_mask_decoder(segmenter, folder / "mask_decoder.onnx")
    return Exported(segmenter, folder)


def pixels(count: int) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(count))


def prompts(count: int, length: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(100 * count + length)
    corners = torch.rand(count, 2, 2, generator=g).sort(dim=1).values.flatten(1)
    valid = (torch.arange(count) % 3 != 1).float()  # some by text alone
    mask = torch.arange(length) < torch.randint(0, length + 1, (count, 1), generator=g)
    mask[0] = False  # no text at all
    return (
        corners,
        torch.rand(count, 2, generator=g),
        valid,
        torch.randn(count, length, TEXT, generator=g),
        mask,
    )


def close(found: np.ndarray, wanted: Tensor) -> None:
    scale = float(wanted.abs().max())
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4 * scale, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 3])
def test_image_encoder_equals_torch(exported: Exported, count: int) -> None:
    session = exported.session("image_encoder")
    with torch.no_grad():
        wanted = exported.segmenter.encode(pixels(count))
    assert tuple(output.name for output in session.get_outputs()) == exported.segmenter.features._fields
    for found, one in zip(session.run(None, {"pixels": pixels(count).numpy()}), wanted, strict=True):
        close(found, one)


@pytest.mark.parametrize(("count", "length"), [(1, 1), (2, 9), (7, 16)])
def test_mask_decoder_equals_torch(exported: Exported, count: int, length: int) -> None:
    model, given = exported.segmenter, prompts(count, length)
    with torch.no_grad():
        features = model.encode(pixels(1))
        wanted, wanted_scores = model.decode(features, *given)
    names = (*model.features._fields, *PROMPTS)
    feeds = {name: value.numpy() for name, value in zip(names, (*features, *given), strict=True)}
    logits, scores = exported.session("mask_decoder").run(list(OUTPUTS), feeds)
    close(logits, wanted)
    np.testing.assert_allclose(scores, wanted_scores.numpy(), atol=1e-4)


def test_the_runtime_decodes_each_image_of_a_batch(exported: Exported) -> None:
    session = OnnxSegmenter(exported.session("image_encoder"), exported.session("mask_decoder"))
    images, given = pixels(3), prompts(4, 5)
    fed = Prompts(*(part.numpy() for part in given))
    for i, features in enumerate(session.encode_batch(images.numpy())):
        logits, scores = session.decode(features, fed)
        alone, _ = session.decode(session.encode(images[i].numpy()), fed)
        with torch.no_grad():
            wanted, _ = exported.segmenter.decode(exported.segmenter.encode(images[i : i + 1]), *given)
        close(logits, wanted)
        np.testing.assert_allclose(alone, logits, atol=1e-4 * np.abs(logits).max())
        assert scores.shape == (4,)


def test_many_prompts_are_drawn_a_part_at_a_time(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = exported.session("image_encoder"), exported.session("mask_decoder")
    monkeypatch.setattr(OnnxSegmenter, "most_at_once", 7)
    whole = OnnxSegmenter(*sessions)
    monkeypatch.setattr(onnxruntime_segmenter, "MASK_PIXELS", 3 * exported.segmenter.config.mask_size**2)
    parted = OnnxSegmenter(*sessions)
    features = whole.encode(pixels(1)[0].numpy())
    fed = Prompts(*(part.numpy() for part in prompts(7, 4)))
    for found, wanted in zip(parted.decode(features, fed), whole.decode(features, fed), strict=True):
        assert len(found) == 7
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


def test_features_of_an_image_are_not_repeated_for_its_prompts(exported: Exported) -> None:
    model = onnx.load(exported.folder / "mask_decoder.onnx")
    shapes = {
        value.name: [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    for name in exported.segmenter.features._fields:
        assert shapes[name][0] == 1
    assert isinstance(shapes["boxes"][0], str)
    cells = exported.segmenter.config.grid**2
    expanded = [node for node in model.graph.node if node.op_type in ("Expand", "Tile")]
    sizes = {v.name: v.type.tensor_type.shape.dim for v in model.graph.value_info}
    for node in expanded:
        assert all(d.dim_value != cells for d in sizes.get(node.output[0], ())), node.name


def test_cells_are_projected_for_the_image_alone(exported: Exported) -> None:
    """Of the products with a matrix of weights, only drawing takes in all cells of every prompt."""
    graph = onnx.load(exported.folder / "mask_decoder.onnx").graph
    matrices = {constant.name for constant in graph.initializer if len(constant.dims) == 2}
    shapes = {
        value.name: [d.dim_value or d.dim_param for d in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    cells, found = exported.segmenter.config.grid**2, set()
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in matrices:
            sizes = shapes[node.input[0]]
            if f"{cells}*N" in sizes or ("N" in sizes and sizes[-2] == cells):
                found.add(node.input[1])
    assert found == {"mask_decoder.up_0.plain.weight"}


def test_weights_too_large_for_one_file_lie_beside_it(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exported.segmenter.config.architecture != "sam":
        pytest.skip("only SAM's largest encoder is so large")
    monkeypatch.setattr(segmenter_graph, "LARGEST", 10_000)
    path = tmp_path / "image_encoder.onnx"
    write_image_encoder(exported.segmenter, path)
    assert path.stat().st_size < (tmp_path / "image_encoder.onnx.data").stat().st_size
    feeds = {"pixels": pixels(1).numpy()}
    found = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    np.testing.assert_array_equal(found, exported.session("image_encoder").run(None, feeds)[0])
    quantise("image_encoder", path, tmp_path / "int8.onnx")
    whole = ort.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    assert whole.run(None, feeds)[0].shape == found.shape


@pytest.mark.parametrize("role", ["image_encoder", "mask_decoder"])
def test_int8_stays_close(exported: Exported, tmp_path: Path, role: str) -> None:
    target = tmp_path / "int8.onnx"
    quantise(role, exported.folder / f"{role}.onnx", target)
    assert "MatMulInteger" in {node.op_type for node in onnx.load(target).graph.node}
    model, given = exported.segmenter, prompts(5, 9)
    feeds: dict[str, Any] = {"pixels": pixels(2).numpy()}
    if role == "mask_decoder":
        with torch.no_grad():
            features = model.encode(pixels(1))
        names = (*model.features._fields, *PROMPTS)
        feeds = {name: value.numpy() for name, value in zip(names, (*features, *given), strict=True)}
    found = ort.InferenceSession(target, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    wanted = exported.session(role).run(None, feeds)[0]
    assert np.abs(found - wanted).mean() < 0.1 * np.abs(wanted).mean()
