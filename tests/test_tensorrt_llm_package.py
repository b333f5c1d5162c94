"""The TensorRT-LLM package: a whole model, ModelOpt's part, and the text model for the engine path.

ModelOpt itself runs where it is installed; TensorRT-LLM is not executed.
"""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export import model_optimizer, tensorrt_llm_checkpoint
from export.model_optimizer import FORMATS, block_size, recipe, require_format
from export.tensorrt_llm_checkpoint import engine_config, layer_shapes, write_engine_checkpoint
from export.tensorrt_llm_package import (
    SERVE,
    image_processor,
    llm_arguments,
    main,
    with_template,
    write_package,
    yaml,
)
from ppcr.checkpoint import Checkpoint
from ppcr.errors import CheckpointError, EngineError, UsageError
from ppcr.manifest import Manifest
from ppcr.model.checkpoint import load_mllm
from tests import record_signatures
from tests.recorded import table

TABLE = table("tensorrt_llm")
OPTIMIZER = table("model_optimizer")
KEPT, FOLDED = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
SCALE = "model.layers.0.mlp.up_proj.weight_scale"


@pytest.fixture(scope="module")
def opened(checkpoint: Path) -> Checkpoint:
    return Checkpoint.open(checkpoint)


def test_package_holds_a_whole_model(opened: Checkpoint, tmp_path: Path) -> None:
    write_package(opened, tmp_path / "tensorrt_llm")
    model = tmp_path / "tensorrt_llm" / "model"
    for path in opened.mllm.iterdir():
        copy = model / path.name
        assert copy.read_bytes() == path.read_bytes() or path.name == "tokenizer_config.json"
    arguments = llm_arguments(opened.config.mllm)
    assert set(arguments) <= set(TABLE["keywords"]["LLM"])
    assert set(arguments["kv_cache_config"]) <= set(TABLE["keywords"]["KvCacheConfig"])
    assert set(arguments["cuda_graph_config"]) <= set(TABLE["keywords"]["CudaGraphConfig"])
    assert "trtllm-serve model" in (tmp_path / "tensorrt_llm" / "README.md").read_text()
    read = pytest.importorskip("yaml").safe_load((tmp_path / "tensorrt_llm" / "llm_args.yaml").read_text())
    assert read == arguments == pytest.importorskip("yaml").safe_load(yaml(arguments))
    sizes = json.loads((model / "preprocessor_config.json").read_text())
    assert sizes == image_processor(opened.config.mllm)
    height, width = opened.config.mllm.image_size
    assert sizes["min_pixels"] == sizes["max_pixels"] == height * width


def test_foreign_template_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no chat template of this project"):
        with_template({"chat_template": "{{ messages }}"})


def test_commands_have_recorded_options_only() -> None:
    for name, text in (("trtllm-serve", SERVE), ("trtllm-build", tensorrt_llm_checkpoint.BUILD)):
        assert text.startswith(f"{name} ")
        assert {word for word in text.split() if word.startswith("--")} <= set(TABLE["options"][name])


def recipes() -> dict[str, Any]:
    """ModelOpt's recipes by name. JSON has no whole numbers for keys, but the last axis is -1."""

    def keyed(pairs: dict[str, Any]) -> dict[Any, Any]:
        return {int(k) if k.lstrip("-").isdigit() else k: value for k, value in pairs.items()}

    found: dict[str, Any] = json.loads(json.dumps(OPTIMIZER["recipes"]), object_hook=keyed)
    return found


class FakeModelOpt:
    """ModelOpt as far as `quantize_directory` calls it, with the recorded parameters only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.answered = 0
        quantizer = types.SimpleNamespace(quantize=self.quantize, **recipes())
        writer = types.SimpleNamespace(export_hf_checkpoint=self.export)
        monkeypatch.setattr(model_optimizer, "load_model_optimizer", lambda: (quantizer, writer))

    def quantize(self, model: Any, config: Any, **keywords: Any) -> None:
        assert set(keywords) <= set(OPTIMIZER["parameters"]["quantize"])
        assert set(config) == {"quant_cfg", "algorithm"}
        keywords["forward_loop"](model)
        self.calls.append("quantize")

    def export(self, model: Any, **keywords: Any) -> None:
        assert set(keywords) <= set(OPTIMIZER["parameters"]["export_hf_checkpoint"])
        assert keywords["dtype"] == torch.float16
        folder = keywords["export_dir"]
        assert not list(folder.glob("*.safetensors")), "the whole weights were not taken away"
        written = {KEPT: torch.ones(4), SCALE: torch.ones(4), FOLDED: torch.ones(4, dtype=torch.uint8)}
        save_file(written, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_algo": "FP8"}}))
        (folder / "hf_quant_config.json").write_text("{}")
        self.calls.append("export")


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_package(
    opened: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fake, told = FakeModelOpt(monkeypatch), list[str]()
    write_package(opened, tmp_path / "p", quantize=name, scenes=1, progress=told.append)
    model = tmp_path / "p" / "model"
    assert fake.calls == ["quantize", "export"] and told == [name]
    types_of = {name: value.dtype for name, value in load_file(model / "model.safetensors").items()}
    assert types_of == {KEPT: torch.float16, SCALE: torch.float32, FOLDED: torch.uint8}
    config = json.loads((model / "config.json").read_text())
    assert config == {**opened.mllm_config, "quantization_config": {"quant_algo": "FP8"}}
    assert (model / "tokenizer.json").read_bytes() == opened.tokenizer.read_bytes()
    assert f"are {name}, quantised by" in (tmp_path / "p" / "README.md").read_text()


def test_int4_blocks_fill_the_widths(opened: Checkpoint) -> None:
    held = recipes()
    quantizer = types.SimpleNamespace(**held)
    assert block_size(opened) == 64  # 704 is no multiple of 128
    found = recipe(quantizer, "int4_awq", opened)
    sizes = [
        rule["cfg"]["block_sizes"] for rule in found["quant_cfg"] if "block_sizes" in rule.get("cfg", {})
    ]
    assert [size[-1] for size in sizes] == [64]
    assert held == recipes(), "ModelOpt's own recipe was changed"
    off = {rule["quantizer_name"] for rule in found["quant_cfg"] if rule.get("enable") is False}
    assert {"*visual*", "*lm_head*"} <= off


def widths(checkpoint: Checkpoint, hidden: int) -> Any:
    config = {**checkpoint.mllm_config, "text_config": {"hidden_size": hidden, "intermediate_size": 704}}
    return types.SimpleNamespace(mllm_config=config, config=checkpoint.config)


def test_what_modelopt_cannot_do_is_one_line(
    opened: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="given models in fp8, int4_awq, not in 'int8'"):
        require_format("int8", opened)
    with pytest.raises(UsageError, match="that 64 divides, this model's are 96 and 704: give --quantize fp8"):
        require_format("int4_awq", widths(opened, 96))
    monkeypatch.setitem(sys.modules, "modelopt", None)
    monkeypatch.setitem(sys.modules, "modelopt.torch", None)
    monkeypatch.setitem(sys.modules, "modelopt.torch.export", None)
    output = ["--output", str(tmp_path / "nothing"), "--quantize", "fp8"]
    assert main(output) == EngineError.exit_code
    assert "pip install nvidia-modelopt==" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_table_is_that_of_the_installed_modelopt() -> None:
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")
    assert record_signatures.model_optimizer() == OPTIMIZER


def test_real_modelopt_writes_fp8_weights(opened: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")
    write_package(opened, tmp_path / "p", quantize="fp8", scenes=1)
    found = load_file(tmp_path / "p" / "model" / "model.safetensors")
    whole = opened.mllm_tensors
    assert set(whole) <= set(found)
    for name in whole:
        weight = torch.from_numpy(whole[name].copy())
        if f"{name.removesuffix('weight')}weight_scale" in found:
            assert found[name].dtype == torch.float8_e4m3fn and ".layers." in name
            scale = found[f"{name.removesuffix('weight')}weight_scale"]
            back = found[name].float() * scale
            # Three bits behind the leading one; below 2**-6 of the scale, steps of 2**-9.
            step = torch.maximum(weight.abs() / 16, scale * 2**-10)
            assert ((back - weight).abs() <= step * 1.01).all(), name
        else:
            assert found[name].dtype == torch.float16
            assert torch.equal(found[name].float(), weight), name
    folded = [name for name in found if name.endswith("weight_scale")]
    assert len(folded) == 7 * opened.mllm_config["text_config"]["num_hidden_layers"]


@pytest.fixture(scope="module")
def engine_checkpoint(opened: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm") / "engine_checkpoint"
    write_engine_checkpoint(opened, folder)
    return folder


def test_engine_checkpoint_has_recorded_names_and_shapes(opened: Checkpoint, engine_checkpoint: Path) -> None:
    config = json.loads((engine_checkpoint / "config.json").read_text())
    recorded = TABLE["engine_checkpoint"]
    assert set(config) == set(recorded["config"])
    assert config["qwen_type"] in recorded["qwen_types"]
    found = load_file(engine_checkpoint / "rank0.safetensors")
    layers = [f"transformer.layers.{n}." for n in range(config["num_hidden_layers"])]
    names = {f"{layer}{name}" for layer in layers for name in recorded["layer_weights"]}
    assert set(found) == names | set(recorded["weights"])
    assert {value.dtype for value in found.values()} == {torch.float16}
    for layer in layers:
        for name in recorded["layer_weights"]:
            assert tuple(found[layer + name].shape) == layer_shapes(config)[name], name
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    assert tuple(found["lm_head.weight"].shape) == (vocabulary, hidden)
    text = opened.mllm_config["text_config"]
    assert config["rotary_scaling"]["mrope_section"] == text["rope_parameters"]["mrope_section"]
    assert 2 * sum(config["rotary_scaling"]["mrope_section"]) == config["rotary_embedding_dim"]


def test_engine_checkpoint_computes_what_the_model_does(opened: Checkpoint, engine_checkpoint: Path) -> None:
    # A plain text model by TensorRT-LLM's names and meanings: fc is activated, gate multiplied, qkv in a row.
    config = json.loads((engine_checkpoint / "config.json").read_text())
    held = {k: v.float() for k, v in load_file(engine_checkpoint / "rank0.safetensors").items()}
    ids = torch.from_numpy(np.random.default_rng(7).integers(0, 500, 13))
    with torch.inference_mode():
        wanted = load_mllm(opened.mllm)(input_ids=ids[None]).logits[0]
        got = text_model(ids, config, held)
    assert torch.equal(wanted.argmax(1), got.argmax(1))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def text_model(ids: torch.Tensor, config: dict[str, Any], held: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits [S, vocabulary] of a text without images: all three sections count the same positions."""
    heads, groups, head = config["num_attention_heads"], config["num_key_value_heads"], config["head_size"]
    count = len(ids)
    turns = config["rotary_base"] ** (-torch.arange(0, head, 2) / head)
    angles = torch.arange(count)[:, None] * turns
    cos, sin = (table.repeat(1, 2)[:, None] for table in (angles.cos(), angles.sin()))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["norm_epsilon"]) * held[name]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat([-high, low], -1) * sin

    x = held["transformer.vocab_embedding.weight"][ids]
    for number in range(config["num_hidden_layers"]):
        at = f"transformer.layers.{number}."
        rows = norm(x, f"{at}input_layernorm.weight") @ held[f"{at}attention.qkv.weight"].T
        rows = (rows + held[f"{at}attention.qkv.bias"]).view(count, heads + 2 * groups, head)
        q, k, v = rows.split([heads, groups, groups], 1)
        q, k = rotate(q), rotate(k)
        k, v = (part.repeat_interleave(heads // groups, 1).transpose(0, 1) for part in (k, v))
        seen = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, is_causal=True)
        x = x + seen.transpose(0, 1).reshape(count, -1) @ held[f"{at}attention.dense.weight"].T
        y = norm(x, f"{at}post_layernorm.weight")
        gated = torch.nn.functional.silu(y @ held[f"{at}mlp.fc.weight"].T) * (
            y @ held[f"{at}mlp.gate.weight"].T
        )
        x = x + gated @ held[f"{at}mlp.proj.weight"].T
    return norm(x, "transformer.ln_f.weight") @ held["lm_head.weight"].T


def test_command_adds_the_package_to_a_bundle(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "tiny"))
    assert main(["--output", str(copy), "--engine-checkpoint"]) == 0
    assert "written, not executed" in capsys.readouterr().out
    manifest = Manifest.load(copy)
    manifest.verify(copy)
    folder = "tensorrt_llm/engine_checkpoint"
    assert {f"{folder}/config.json", f"{folder}/rank0.safetensors"} <= set(manifest.files)
    assert "trtllm-build --checkpoint_dir engine_checkpoint" in (copy / "tensorrt_llm/README.md").read_text()
    # Without the option, the next package has none.
    assert main(["--output", str(copy)]) == 0
    assert not [name for name in Manifest.load(copy).files if name.startswith(folder)]


def test_family_without_engines_is_refused(opened: Checkpoint) -> None:
    mllm = types.SimpleNamespace(family="qwen3_vl")
    other = types.SimpleNamespace(config=types.SimpleNamespace(mllm=mllm))
    with pytest.raises(UsageError, match="no text model of 'qwen3_vl'.*leave --engine-checkpoint out"):
        tensorrt_llm_checkpoint.require_engine_path(other)  # type: ignore[arg-type]
    config = {**engine_config(opened), "hidden_size": 192}
    with pytest.raises(CheckpointError, match=r"has shape \[1600, 256\], its config.json says \[1600, 192\]"):
        dict(tensorrt_llm_checkpoint.weights(opened, config))
