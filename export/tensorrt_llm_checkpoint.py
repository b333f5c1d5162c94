"""The MLLM's text model as a checkpoint of TensorRT-LLM's engine path, which release 1.2 is the last to have.

That path knows the text model of Qwen2-VL and none of Qwen2.5-VL. The two compute the same: rotary positions
in three sections, biases on queries, keys and values, a gated MLP. So a Qwen2.5-VL's text model is written
as a Qwen2-VL's; image features come from this project's own vision graph, through the prompt table.

Written against the sources of 1.2.0 (`tests/signatures/tensorrt_llm.json`): names and shapes are tested, no
engine was built from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcr.checkpoint import Checkpoint
from ppcr.errors import UsageError
from ppcr.files import write_json

if TYPE_CHECKING:
    import torch

BUILD = (
    "trtllm-build --checkpoint_dir engine_checkpoint --output_dir engine --max_batch_size 1 "
    "--max_seq_len {length} --max_prompt_embedding_table_size {features}"
)
_FAMILIES = ("qwen2_vl", "qwen2_5_vl")
_PREFIXES = ("model.", "model.language_model.")
# Names of a layer in TensorRT-LLM and here. Its "gate" is what is multiplied, its "fc" what is activated.
_COPIED = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_layernorm.weight": "post_attention_layernorm.weight",
    "attention.dense.weight": "self_attn.o_proj.weight",
    "mlp.fc.weight": "mlp.gate_proj.weight",
    "mlp.gate.weight": "mlp.up_proj.weight",
    "mlp.proj.weight": "mlp.down_proj.weight",
}


def write_engine_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write config.json and rank0.safetensors for one GPU into the new directory ``folder``.

    The text model is held in memory at half precision.

    Raises:
        UsageError: a family whose text model the engine path does not have.
        CheckpointError: a tensor is missing, or not of the shape that the configuration says.
    """
    from safetensors.torch import save_file

    require_engine_path(checkpoint)
    config = engine_config(checkpoint)
    folder.mkdir(parents=True)
    save_file(dict(weights(checkpoint, config)), folder / "rank0.safetensors", {"format": "pt"})
    write_json(folder / "config.json", config)


def require_engine_path(checkpoint: Checkpoint) -> None:
    """Raise UsageError unless TensorRT-LLM 1.2 has an engine for the checkpoint's text model."""
    family = checkpoint.config.mllm.family
    if family not in _FAMILIES:
        raise UsageError(
            f"TensorRT-LLM's engines, which 1.2 is the last to have, know no text model of {family!r}, only "
            f"of {', '.join(_FAMILIES)}: leave --engine-checkpoint out, model/ is served without it"
        )


def engine_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of the engine path: a `QWenConfig` of the type "qwen2_vl"."""
    whole = checkpoint.mllm_config
    text = {**whole, **whole.get("text_config", {})}
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    # transformers 5 says it all in rope_parameters, 4 in two places.
    rotary = text.get("rope_parameters") or text["rope_scaling"]
    head = text.get("head_dim") or hidden // heads
    dtype = whole.get("dtype") or whole.get("torch_dtype")
    return {
        "architecture": "Qwen2VLForConditionalGeneration",
        "qwen_type": "qwen2_vl",
        "dtype": dtype if dtype in ("float16", "bfloat16") else "float16",
        "logits_dtype": "float32",
        "vocab_size": text["vocab_size"],
        "hidden_size": hidden,
        "num_hidden_layers": text["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": text["num_key_value_heads"],
        "head_size": head,
        "intermediate_size": text["intermediate_size"],
        "hidden_act": text["hidden_act"],
        "norm_epsilon": text["rms_norm_eps"],
        "attn_bias": True,
        "mlp_bias": False,
        "position_embedding_type": "mrope",
        "max_position_embeddings": text["max_position_embeddings"],
        "seq_length": checkpoint.config.mllm.max_length,
        "rotary_base": float(rotary.get("rope_theta") or text["rope_theta"]),
        "rotary_embedding_dim": head,
        "rotary_scaling": {"type": "mrope", "mrope_section": list(rotary["mrope_section"])},
        "tie_word_embeddings": bool(whole.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }


def weights(checkpoint: Checkpoint, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the text model by TensorRT-LLM's names, in ``config``'s type."""
    import torch

    held = checkpoint.mllm_tensors
    shapes = layer_shapes(config)
    vocabulary = (config["vocab_size"], config["hidden_size"])

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        found = held.name_of(*(f"{prefix}{name}" for prefix in _PREFIXES))
        held.require(found, shape)
        return torch.from_numpy(held[found].copy()).to(getattr(torch, config["dtype"]))

    embedding = read("embed_tokens.weight", vocabulary)
    yield "transformer.vocab_embedding.weight", embedding
    yield "transformer.ln_f.weight", read("norm.weight", (config["hidden_size"],))
    if config["tie_word_embeddings"]:
        yield "lm_head.weight", embedding.clone()
    else:
        held.require("lm_head.weight", vocabulary)
        head = torch.from_numpy(held["lm_head.weight"].copy())
        yield "lm_head.weight", head.to(embedding.dtype)
    widths = {letter: shapes[f"attention.{letter}"][0] for letter in "qkv"}
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"layers.{layer}.", f"transformer.layers.{layer}."
        for name, source in _COPIED.items():
            yield theirs + name, read(ours + source, shapes[name])
        for part, tail in (("weight", (config["hidden_size"],)), ("bias", ())):
            rows = [
                read(f"{ours}self_attn.{letter}_proj.{part}", (width, *tail))
                for letter, width in widths.items()
            ]
            yield f"{theirs}attention.qkv.{part}", torch.cat(rows)


def layer_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors by TensorRT-LLM's names, and of queries, keys and values apart."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_size"]
    keys = config["num_key_value_heads"] * config["head_size"]
    return {
        "input_layernorm.weight": (hidden,),
        "post_layernorm.weight": (hidden,),
        "attention.q": (queries, hidden),
        "attention.k": (keys, hidden),
        "attention.v": (keys, hidden),
        "attention.qkv.weight": (queries + 2 * keys, hidden),
        "attention.qkv.bias": (queries + 2 * keys,),
        "attention.dense.weight": (hidden, queries),
        "mlp.fc.weight": (inner, hidden),
        "mlp.gate.weight": (inner, hidden),
        "mlp.proj.weight": (hidden, inner),
    }
