"""Decoders of both families against transformers: logits, two turns on one cache, and every number format."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.random_model import MODELS, published_config
from export.decoder_graph import DecoderSizes, write_decoder
from export.vision_graph import VisionSizes
from ppcr.errors import CheckpointError
from ppcr.pretrained import RESOLUTIONS
from ppcr.tensors import TensorFiles
from tests.families import FAMILIES, PUBLISHED, Conversation, Small, Talk, save, two_turns, worst

ROOT = Path(__file__).resolve().parents[1]
GRID = (3, 5)


@dataclass(frozen=True)
class Exported:
    size: Small
    model: Any
    folder: Path
    config: dict[str, Any]

    def write(self, name: str, **options: Any) -> Talk:
        path = self.folder / f"{name}.onnx"
        sizes = write_decoder(self.config, TensorFiles(self.folder), path, external=True, **options)
        return Talk.open(path, sizes)


@pytest.fixture(scope="module", params=["qwen2_5_vl-tied", "qwen2_5_vl", "qwen3_vl-tied", "qwen3_vl"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    family, tied, _ = request.param.partition("-")
    size = Small(family, tied=bool(tied))
    if request.param == "qwen2_5_vl":
        size = replace(size, heads=2, kv_heads=2, head_dim=64)
    if request.param == "qwen3_vl":
        # Heads wider than the hidden state; and the second of two DeepStack levels meets the last layer, of
        # which one token is computed.
        size = replace(size, heads=6, layers=2)
    model = size.build()
    folder = tmp_path_factory.mktemp(request.param)
    save(model, folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return Exported(size, model, folder, json.loads((folder / "config.json").read_text()))


@pytest.fixture(scope="module")
def talk(exported: Exported) -> Talk:
    return exported.write("fp32")


@pytest.mark.parametrize("length", [4, 11, 40])
def test_logits_equal_transformers(exported: Exported, talk: Talk, length: int) -> None:
    said = Conversation.random(exported.size, length, GRID)
    embeddings, levels = said.embedded(exported.model)
    wanted = said.logits(exported.model)
    whole = talk.again()
    whole.look_at(said.image_start, GRID)
    assert worst(whole.extend(embeddings, levels), wanted[-1]) <= 1e-4
    # In blocks of odd sizes, on the cache, each block's last token agrees as well.
    pieces, start = talk.again(), 0
    pieces.look_at(said.image_start, GRID)
    for end in [*range(5, len(said.ids), 7), len(said.ids)]:
        logits = pieces.extend(embeddings[start:end], [level[start:end] for level in levels])
        assert worst(logits, wanted[end - 1]) <= 1e-4
        start = end


def test_deepstack_is_not_idle(exported: Exported, talk: Talk) -> None:
    if not talk.sizes.deepstack:
        pytest.skip("Qwen2.5-VL has no DeepStack")
    said = Conversation.random(exported.size, 9, GRID)
    embeddings, levels = said.embedded(exported.model)
    wanted = said.logits(exported.model)[-1]
    for left_out in range(talk.sizes.deepstack):
        changed = [np.zeros_like(v) if i == left_out else v for i, v in enumerate(levels)]
        fresh = talk.again()
        fresh.look_at(said.image_start, GRID)
        assert worst(fresh.extend(embeddings[:-6], [v[:-6] for v in changed]), wanted) > 1e-3


def test_two_turns_on_one_cache_equal_generate(exported: Exported, talk: Talk) -> None:
    said = Conversation.random(exported.size, 9, GRID)
    two_turns(talk.again(), exported.model, said, (12, 9))


@pytest.mark.parametrize(
    ("name", "options", "alike"),
    [("fp16", {"dtype": np.float16}, 0.9999), ("int8", {"bits": 8}, 0.99), ("int4", {"bits": 4}, 0.7)],
)
def test_number_formats_stay_close(
    exported: Exported, name: str, options: dict[str, Any], alike: float
) -> None:
    said = Conversation.random(exported.size, 9, GRID)
    changed = exported.write(name, **options)
    changed.look_at(said.image_start, GRID)
    got, wanted = changed.extend(*said.embedded(exported.model)), said.logits(exported.model)[-1]
    assert not np.array_equal(got, wanted)
    assert np.corrcoef(got, wanted)[0, 1] > alike


def test_whole_numbers_are_those_of_the_weights(exported: Exported) -> None:
    """The int4 graph's matrices, read back by the standard operator's rule, are within half a step."""
    exported.write("again", bits=4)
    model = onnx.load(exported.folder / "again.onnx")
    constants = {value.name: onnx.numpy_helper.to_array(value) for value in model.graph.initializer}
    unfolded = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(unfolded) == 4 * exported.size.layers + 2  # the last layer has queries apart; and the head
    assert {a.i for node in unfolded for a in node.attribute if a.name == "block_size"} == {32}
    numbers = constants["layers.0.mlp.down.weight.int4"].astype(np.float32)
    steps = constants["layers.0.mlp.down.weight.scale"].repeat(32, axis=0)
    wanted = exported.model.model.language_model.layers[0].mlp.down_proj.weight.detach().numpy().T
    assert (np.abs(numbers * steps - wanted) <= 1.02 * steps).all()
    assert np.abs(numbers * steps - wanted).mean() < 0.3 * steps.mean()
    assert "lm_head.weight.int8" in constants


def test_bfloat16_graph_holds_no_other_floats(exported: Exported) -> None:
    """For engines on a GPU: onnxruntime has no bfloat16 kernels on a CPU, so this graph is not run here."""
    path = exported.folder / "bf16.onnx"
    sizes = write_decoder(
        exported.config, TensorFiles(exported.folder), path, external=True, dtype=ml_dtypes.bfloat16
    )
    model = onnx.load(path)
    floats = {value.data_type for value in model.graph.initializer} - {onnx.TensorProto.INT64}
    assert floats == {onnx.TensorProto.BFLOAT16}
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    assert kinds["inputs_embeds"] == kinds[f"k_cache_{sizes.layers - 1}"] == onnx.TensorProto.BFLOAT16


def test_checkpoint_in_bfloat16_streams_exactly(tmp_path: Path) -> None:
    import torch

    model = Small("qwen3_vl", layers=2).build()
    save(model, tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    write_decoder(config, TensorFiles(tmp_path), tmp_path / "fp32.onnx", external=True)
    held = {
        value.name: onnx.numpy_helper.to_array(value)
        for value in onnx.load(tmp_path / "fp32.onnx").graph.initializer
    }
    wanted = model.model.language_model.layers[1].mlp.down_proj.weight.detach().float().numpy()
    np.testing.assert_array_equal(held["layers.1.mlp.down.weight"], wanted.T)


def test_pieces_join_to_the_whole(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    before = exported.write("whole", bits=4)
    monkeypatch.setattr("export.matrices._PIECE_BYTES", 40_000)
    exported.write("pieces", bits=4)
    assert before.sizes
    data = [(exported.folder / f"{name}.onnx.data").read_bytes() for name in ("whole", "pieces")]
    assert data[0] == data[1]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.skipif(
    not os.environ.get("PPCR_TRUE_WIDTH"), reason="set PPCR_TRUE_WIDTH=1; takes up to 8 GB and minutes"
)
def test_published_widths_at_two_layers(name: str, tmp_path: Path) -> None:
    size = Small.published(name, vocabulary=4096)
    model = size.build()
    save(model, tmp_path, shard="1GB")
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = write_decoder(config, TensorFiles(tmp_path), tmp_path / "fp32.onnx", external=True)
    talk, said = Talk.open(tmp_path / "fp32.onnx", sizes), Conversation.random(size, 21, GRID)
    fresh = talk.again()
    fresh.look_at(said.image_start, GRID)
    off = worst(fresh.extend(*said.embedded(model)), said.logits(model)[-1])
    print(f"{name}: largest difference of logits {off:.1e} of the largest")
    assert off <= 1e-4
    two_turns(talk, model, said, (8, 6))


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_shape_and_missing_shard_are_named(family: str, tmp_path: Path) -> None:
    save(Small(family, tied=False).build(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    wrong = json.loads(json.dumps(config))
    wrong["text_config"]["intermediate_size"] = 160
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight .* shape \[192, 128\].* \[160, 128\]"):
        write_decoder(wrong, TensorFiles(tmp_path), tmp_path / "decoder.onnx", external=True)
    assert not list(tmp_path.glob("decoder.onnx*"))
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        TensorFiles(tmp_path)
    tensors.pop("lm_head.weight", None)
    save_file(tensors, shard)
    if "lm_head.weight" not in TensorFiles(tmp_path):
        with pytest.raises(CheckpointError, match=r"holds no tensor lm_head\.weight"):
            write_decoder(config, TensorFiles(tmp_path), tmp_path / "decoder.onnx", external=True)
        assert not list(tmp_path.glob("decoder.onnx*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}}, "yarn"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_parameters": None}, "does not describe"),
    ],
)
def test_options_without_a_graph_are_refused(change: dict[str, Any], said: str) -> None:
    config = Small("qwen2_5_vl").config().to_dict()
    config["text_config"].update(change)
    with pytest.raises(CheckpointError, match=said):
        DecoderSizes.from_config(config)


def test_flat_config_of_the_hub_gives_the_same_sizes() -> None:
    """The published Qwen2.5-VL directories keep the text's fields at the top level."""
    config = Small("qwen2_5_vl").config().to_dict()
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {**text, **config, "rope_theta": rope["rope_theta"]}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    assert DecoderSizes.from_config(flat) == DecoderSizes.from_config(Small("qwen2_5_vl").config().to_dict())


@pytest.mark.parametrize("name", MODELS)
def test_published_sizes_are_read(name: str) -> None:
    config = published_config(name)
    sizes = DecoderSizes.from_config(config)
    tower = VisionSizes.from_config(config, RESOLUTIONS[sizes.family][0])
    assert sizes.head_dim == 128 and sum(sizes.mrope_section) == 64
    assert tower.out == sizes.hidden and len(tower.deepstack) == sizes.deepstack
    attention = 2 * sizes.hidden * (sizes.heads + sizes.kv_heads) * sizes.head_dim
    block = (
        4 * tower.hidden**2 + (3 if sizes.family == "qwen2_5_vl" else 2) * tower.hidden * tower.intermediate
    )
    parameters = (
        sizes.layers * (attention + 3 * sizes.hidden * sizes.intermediate)
        + (1 if sizes.tied else 2) * sizes.vocabulary * sizes.hidden
        + tower.depth * block
        + (1 + len(tower.deepstack)) * (tower.merged + tower.out) * tower.merged
    )
    # What the names promise, as the hub counts them.
    billions = {"3B": 3.75, "7B": 8.29, "2B": 2.13, "4B": 4.44, "8B": 8.77}[name.partition("-")[2]]
    assert abs(parameters / 1e9 - billions) < 0.03


WRITE = """
import json, resource, sys
from pathlib import Path
from export.decoder_graph import write_decoder
from ppcr.tensors import TensorFiles
folder = Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
write_decoder(config, TensorFiles(folder), folder / "decoder.onnx", external=True, bits=4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def written(folder: Path, *limit: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WRITE, str(folder), *limit]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    size = Small("qwen3_vl", hidden=512, intermediate=1536, heads=8, head_dim=64, layers=20)
    save(size.build(), tmp_path, shard="60MB")
    whole = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    run = written(tmp_path)
    assert run.returncode == 0, run.stderr
    assert whole > 200e6
    assert int(run.stdout) * 1024 < 0.4 * whole


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    save(Small("qwen2_5_vl", hidden=256, intermediate=512, head_dim=64, layers=4).build(), tmp_path)
    before = sorted(tmp_path.iterdir())
    run = written(tmp_path, "500000")
    assert run.returncode != 0
    assert "File too large" in run.stderr
    assert sorted(tmp_path.iterdir()) == before
