"""Write and read a checkpoint's MLLM: a plain Qwen2.5-VL directory for transformers 4.57 and 5.x."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from ppcr.errors import CheckpointError

_FAMILIES = {"qwen2_5_vl": Qwen2_5_VLForConditionalGeneration, "qwen3_vl": Qwen3VLForConditionalGeneration}

# Text fields that readers before transformers 5 look for at the top level of a Qwen2.5-VL configuration.
_TOP_LEVEL = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "bos_token_id",
    "eos_token_id",
    "max_window_layers",
    "use_sliding_window",
    "sliding_window",
    "attention_dropout",
    "use_cache",
    "initializer_range",
)


def _readable_by_both(path: Path) -> None:
    """Add the rotary and dtype fields of transformers 4.57 beside those of 5.x."""
    config = json.loads(path.read_text(encoding="utf-8"))
    text = config["text_config"]
    rope = text["rope_parameters"]
    scaling = {"type": "mrope", "rope_type": "default", "mrope_section": rope["mrope_section"]}
    for fields in (text, config):
        fields["rope_scaling"] = dict(scaling)
        fields["rope_theta"] = rope["rope_theta"]
    for key in _TOP_LEVEL:
        config.setdefault(key, text.get(key))
    config["torch_dtype"] = text["torch_dtype"] = config.get("dtype", "float32")
    path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def save_mllm(
    model: Qwen2_5_VLForConditionalGeneration, folder: Path, *, dtype: torch.dtype | None = None
) -> None:
    """Write config.json, generation_config.json and model.safetensors, each renamed into place.

    The tokenizer's files are written by ``ppcr.model.tokenizer.save_tokenizer``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as beside:
        state = model.state_dict()
        state.pop("lm_head.weight", None)  # tied to the input embedding
        if dtype is not None:
            state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        previous, model.config.dtype = model.config.dtype, dtype or torch.float32
        try:
            model.save_pretrained(beside, state_dict=state)
        finally:
            model.config.dtype = previous
        _readable_by_both(Path(beside) / "config.json")
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            os.replace(Path(beside) / name, folder / name)


def load_mllm(folder: Path) -> Any:
    """Read a Qwen2.5-VL or Qwen3-VL directory as float32, ready for inference.

    Raises:
        CheckpointError: the directory is missing, incomplete or of another architecture.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no config.json: point --checkpoint at a directory with mllm/ and segmenter/"
        )
    try:
        family = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        model = _FAMILIES[family].from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
    except Exception as error:  # transformers raises OSError, ValueError, RuntimeError, SafetensorError alike
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"cannot read the MLLM in {folder}: {reason}") from error
    return model.eval()
