"""The vision tower in two parts, the first of them in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.vision_graph import write_vision
from ppcr.patches import image_patches
from ppcr.tensors import TensorFiles
from runtime.bundle import Bundle
from runtime.session import Sessions, load_sessions
from tests.families import PATCH, Small, save

ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install '.[openvino]'")

from openvino import opset13 as op  # noqa: E402

from runtime import openvino_cut, openvino_library, openvino_tower  # noqa: E402

GRID = (3, 5)


def cut(model: openvino_library.Model) -> tuple[openvino_library.Model, openvino_library.Model] | None:
    return openvino_cut.cut(model, openvino_tower._BLOCK, openvino_tower._SHARE)


def export(family: str, depth: int, folder: Path) -> Path:
    model = Small(family, layers=3, vision_depth=depth).build()
    save(model, folder)
    path = folder / "vision.onnx"
    side = 2 * PATCH[family]
    config = json.loads((folder / "config.json").read_text())
    write_vision(config, TensorFiles(folder), path, image_size=(GRID[0] * side, GRID[1] * side))
    return path


def run(model: openvino_library.Model, name: str, given: np.ndarray) -> dict[str, np.ndarray]:
    compiled = openvino_library.compile_model(ov.Core(), model, Path("part"), 1)
    return dict(openvino_library.Graph(compiled).run({name: given}))


def worst(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("depth", [2, 5])
def test_both_parts_compute_what_the_whole_does(family: str, depth: int, tmp_path: Path) -> None:
    path = export(family, depth, tmp_path)
    core = ov.Core()
    patches = np.random.default_rng().standard_normal((60, 6 * PATCH[family] ** 2)).astype(np.float32)
    wanted = run(openvino_library.read(core, path), "pixel_values", patches)
    parts = cut(openvino_library.read(core, path))
    assert parts is not None
    found = run(parts[0], "pixel_values", patches)
    if (family, depth) == ("qwen3_vl", 5):  # levels of DeepStack stay where they are made
        assert len(found) > 1
    found |= run(parts[1], "between", found.pop("between"))
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        assert worst(found[name], values) < 1e-5
    # About four fifths of the blocks are before the cut.
    products = [sum(node.get_type_name() == "MatMul" for node in part.get_ordered_ops()) for part in parts]
    assert 0.2 < products[0] / sum(products) < 0.9
    if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        found = openvino_tower.Tower(core, path, 1).run(patches)
        assert set(found) == set(wanted)
        assert all(0 < worst(found[name], values) < 0.02 for name, values in wanted.items())


def test_a_tower_without_named_blocks_is_computed_in_float32(tmp_path: Path) -> None:
    path = export("qwen2_5_vl", 1, tmp_path)  # of one block there are no four fifths
    core = ov.Core()
    assert cut(openvino_library.read(core, path)) is None
    given = op.parameter([2], ov.Type.f32, name="x")
    assert cut(ov.Model([op.relu(given)], [given], "plain")) is None
    patches = np.random.default_rng().standard_normal((60, 6 * PATCH["qwen2_5_vl"] ** 2)).astype(np.float32)
    wanted = run(openvino_library.read(core, path), "pixel_values", patches)["image_features"]
    found = openvino_tower.Tower(core, path, 1).run(patches)["image_features"]
    np.testing.assert_array_equal(found, wanted)


def test_most_of_what_a_tower_in_bf16_loses_is_kept(loaded: Bundle, half: Sessions, samples: Path) -> None:
    mllm, path = loaded.config.mllm, loaded.graphs["vision"]
    core, exact = ov.Core(), load_sessions("onnxruntime", loaded, threads=1).mllm
    whole = openvino_library.compile_model(core, openvino_library.read(core, path), path, 1, bf16=True)
    rough = openvino_library.Graph(whole)
    ours, theirs = [], []
    for number in range(4):
        image = np.asarray(Image.open(samples / f"scene_{number}.png").convert("RGB"))
        patches = image_patches(image, mllm.image_size, mllm)
        wanted = exact.encode_image(patches)
        ours.append(worst(half.mllm.encode_image(patches), wanted))
        theirs.append(worst(rough.run({"pixel_values": patches})["image_features"], wanted))
    assert 0 < np.mean(ours) < np.mean(theirs) / 2
