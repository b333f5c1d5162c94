"""A Hugging Face directory quantised by NVIDIA's ModelOpt, in the form that TensorRT-LLM loads.

ModelOpt measures the text model's activations while the torch reference answers rendered scenes, and writes
the quantised weights with their scales. The vision tower, the embedding and the head stay as they are.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppcr.checkpoint import Checkpoint
from ppcr.errors import CheckpointError, EngineError, UsageError
from ppcr.files import write_json

FORMATS = {"fp8": "FP8_DEFAULT_CFG", "int4_awq": "INT4_AWQ_CFG"}
"""Name on the command line -> ModelOpt's recipe. TensorRT-LLM's torch backend runs both."""
CALIBRATION_SCENES = 32
_BLOCKS = (128, 64)  # inputs that share a scale in int4: what TensorRT-LLM's kernels take
_INSTALL = "install it with: pip install nvidia-modelopt==0.47.0 requests"
_WEIGHTS = "model*.safetensors*"

Progress = Callable[[str], None]


def load_model_optimizer() -> tuple[Any, Any]:
    """``modelopt.torch.quantization`` and ``modelopt.torch.export``.

    Raises:
        EngineError: ModelOpt is not installed, or does not import.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it names the versions of transformers it was tested with
            import modelopt.torch.export as writer
            import modelopt.torch.quantization as quantizer
    except Exception as error:  # it imports much of torch and transformers, and fails in many ways
        raise EngineError(f"ModelOpt cannot be used here ({error}): {_INSTALL}") from None
    return quantizer, writer


def require_format(name: str, checkpoint: Checkpoint) -> None:
    """Raise UsageError unless the checkpoint's text model can be quantised to ``name``."""
    if name not in FORMATS:
        raise UsageError(f"TensorRT-LLM is given models in {', '.join(FORMATS)}, not in {name!r}")
    if name == "int4_awq":
        block_size(checkpoint)


def block_size(checkpoint: Checkpoint) -> int:
    """Inputs that share a scale: the most that divides the inputs of every matrix. Raises UsageError."""
    whole = checkpoint.mllm_config
    text = {**whole, **whole.get("text_config", {})}
    inputs = (text["hidden_size"], text["intermediate_size"])
    for size in _BLOCKS:
        if not any(width % size for width in inputs):
            return size
    told = f"int4_awq needs widths that {_BLOCKS[-1]} divides, this model's are {inputs[0]} and {inputs[1]}"
    raise UsageError(f"{told}: give --quantize fp8")


def quantize_directory(
    checkpoint: Checkpoint,
    model: Path,
    name: str,
    *,
    scenes: int = CALIBRATION_SCENES,
    progress: Progress | None = None,
) -> None:
    """Replace the weights in ``model``, a copy of ``checkpoint.mllm``, by quantised ones.

    The directory's own config.json is kept, with ModelOpt's description of the format in it. ``progress`` is
    told of each scene that was answered.

    Raises:
        UsageError: not a format for this model. EngineError: no ModelOpt, or it fails.
        CheckpointError: the checkpoint cannot be read.
    """
    require_format(name, checkpoint)
    quantizer, writer = load_model_optimizer()
    import torch

    from export.parity import held_out
    from ppcr.model.reference import ReferencePipeline

    reference = ReferencePipeline.load(checkpoint)
    config = (model / "config.json").read_bytes()

    def answer(_: Any) -> None:
        for image, example in held_out(scenes):
            reference.segment(image, example.expressions[0].text)
            if progress is not None:
                progress(name)

    for path in model.glob(_WEIGHTS):
        path.unlink()
    dtype = checkpoint.mllm_config.get("dtype") or checkpoint.mllm_config.get("torch_dtype")
    try:
        quantizer.quantize(reference.mllm, recipe(quantizer, name, checkpoint), forward_loop=answer)
        with torch.inference_mode():
            kind = getattr(torch, dtype) if dtype in ("float16", "bfloat16") else None
            writer.export_hf_checkpoint(reference.mllm, dtype=kind, export_dir=model)
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError, NotImplementedError) as error:
        raise EngineError(f"ModelOpt cannot quantise this model to {name}: {error}") from None
    _keep_types(model, checkpoint)
    _keep_config(model, config)


def recipe(quantizer: Any, name: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """ModelOpt's recipe of that name, int4 in blocks that this model's widths fill."""
    found: dict[str, Any] = copy.deepcopy(getattr(quantizer, FORMATS[name]))
    if name == "int4_awq":
        size = block_size(checkpoint)
        for rule in found["quant_cfg"]:
            blocks = (rule.get("cfg") or {}).get("block_sizes")
            if blocks and -1 in blocks:
                blocks[-1] = size
    return found


def _keep_types(model: Path, checkpoint: Checkpoint) -> None:
    """Give what was not quantised the type that it has in the checkpoint; the reference is float32."""
    import torch
    from safetensors.torch import load_file, save_file

    kinds = {"F16": torch.float16, "BF16": torch.bfloat16}
    held = checkpoint.mllm_tensors
    for path in model.glob("model*.safetensors"):
        tensors = load_file(path)
        for name, value in tensors.items():
            kind = kinds.get(held.kind(name)) if name in held else None
            if kind is not None and value.dtype == torch.float32:
                tensors[name] = value.to(kind)
        save_file(tensors, path, {"format": "pt"})


def _keep_config(model: Path, config: bytes) -> None:
    """The checkpoint's config.json, which every release reads, with what ModelOpt says of the weights."""
    try:
        written = json.loads((model / "config.json").read_text(encoding="utf-8"))
        described = written["quantization_config"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"ModelOpt wrote no description of the quantised weights ({error!r})") from None
    write_json(model / "config.json", {**json.loads(config), "quantization_config": described})
