"""Vision towers of both families against transformers, at every size of a set that shares its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from benchmarks.random_model import published_config
from export.external import ExternalData
from export.vision_graph import VisionSizes, write_vision
from export.vision_qwen3 import learned_positions
from ppcr.errors import CheckpointError
from ppcr.images import patchify
from ppcr.tensors import TensorFiles
from tests.families import FAMILIES, PATCH, Small, save, worst

# In image tokens: a square, a wide and a tall one, one row; windows of 4 x 4 tokens whole and cut.
GRIDS = ((4, 4), (3, 7), (9, 2), (1, 5))


@pytest.fixture(scope="module", params=FAMILIES)
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = Small(request.param).build()
    with torch.no_grad():
        for parameter in model.model.visual.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp(request.param)
    save(model, folder)
    config, tensors = json.loads((folder / "config.json").read_text()), TensorFiles(folder)
    with ExternalData(folder / "vision.data") as data:
        for grid in GRIDS:
            name = folder / f"{grid[0]}x{grid[1]}.onnx"
            write_vision(config, tensors, name, image_size=pixels(request.param, grid), data=data)
            size = data.path.stat().st_size
            if grid == GRIDS[0]:
                first = size
    assert size == first  # graphs of further sizes add nothing
    return model, folder


def pixels(family: str, grid: tuple[int, int]) -> tuple[int, int]:
    side = 2 * PATCH[family]
    return grid[0] * side, grid[1] * side


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_features_equal_transformers(tower: tuple[Any, Path], grid: tuple[int, int]) -> None:
    model, folder = tower
    family = model.config.model_type
    image = np.random.default_rng(grid).standard_normal((3, *pixels(family, grid))).astype(np.float32)
    patches = patchify(image, PATCH[family], 2, 2)
    with torch.no_grad():
        thw = torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
        wanted = model.model.visual(torch.from_numpy(patches), grid_thw=thw)
    session = ort.InferenceSession(folder / f"{grid[0]}x{grid[1]}.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {"pixel_values": patches})
    names = [value.name for value in session.get_outputs()]
    levels = getattr(wanted, "deepstack_features", None) or []
    assert names == ["image_features", *(f"deepstack_{i}" for i in range(len(levels)))]
    for ours, theirs in zip(got, [wanted.pooler_output, *levels], strict=True):
        assert worst(ours, theirs.numpy()) < 1e-4


@pytest.mark.parametrize("name", ["qwen2_5_vl-3B", "qwen3_vl-2B", "qwen3_vl-8B"])
def test_features_equal_transformers_at_published_widths(name: str, tmp_path: Path) -> None:
    """Both towers of Qwen3-VL and Qwen2.5-VL's only one, with three layers, into a narrow decoder."""
    published = published_config(name)["vision_config"]
    size = Small(
        name.partition("-")[0], layers=1, vision_depth=3,
        vision_hidden=published["hidden_size"], vision_intermediate=published["intermediate_size"],
        vision_heads=published["num_heads"],
    )  # fmt: skip
    model = size.build()
    save(model, tmp_path, shard="1GB")
    grid, path = (3, 5), tmp_path / "vision.onnx"
    config = json.loads((tmp_path / "config.json").read_text())
    with ExternalData(tmp_path / "vision.data") as data:
        image_size = pixels(size.family, grid)
        write_vision(config, TensorFiles(tmp_path), path, image_size=image_size, data=data)
    patches = np.random.default_rng().standard_normal((60, 6 * PATCH[size.family] ** 2)).astype(np.float32)
    with torch.no_grad():
        wanted = model.model.visual(torch.from_numpy(patches), grid_thw=torch.tensor([[1, 6, 10]]))
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    got = session.run(None, {"pixel_values": patches})
    levels = getattr(wanted, "deepstack_features", None) or []
    for ours, theirs in zip(got, [wanted.pooler_output, *levels], strict=True):
        assert worst(ours, theirs.numpy()) < 1e-4


def test_positions_are_exact_at_the_corners() -> None:
    size = Small("qwen3_vl")
    sizes = VisionSizes.from_config(size.config().to_dict(), (320, 224))
    table = np.random.default_rng(0).standard_normal((36, 64)).astype(np.float32)
    places = learned_positions(sizes, table)
    assert places.shape == (20 * 14, 64)
    np.testing.assert_array_equal(places[[0, -1]], table[[0, -1]])


def test_int8_tower_stays_close(tower: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = tower
    family = model.config.model_type
    config, tensors = json.loads((folder / "config.json").read_text()), TensorFiles(folder)
    patches = np.random.default_rng(1).standard_normal((64, 6 * PATCH[family] ** 2)).astype(np.float32)
    outputs = []
    for bits in (None, 8):
        path = tmp_path / f"{bits}.onnx"
        write_vision(config, tensors, path, image_size=pixels(family, (4, 4)), bits=bits)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        outputs.append(session.run(["image_features"], {"pixel_values": patches})[0])
    assert not np.array_equal(*outputs)
    assert np.corrcoef(outputs[0].ravel(), outputs[1].ravel())[0, 1] > 0.99


def test_wrong_shape_is_named(tower: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = tower
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 80
    size = pixels(model.config.model_type, (2, 2))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mlp\..* has shape"):
        write_vision(config, TensorFiles(folder), tmp_path / "vision.onnx", image_size=size)
