"""Public weights to a `SamSegmenter`: MobileSAM's .pt file, directories of transformers' SAM and SAM 2."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppcr.errors import CheckpointError
from ppcr.files import read_json
from ppcr.model.sam import SamSegmenter
from ppcr.model.sam_config import SamConfig
from ppcr.model.sam_weights import from_official, from_transformers
from ppcr.model.tiny_vit import TinyViTSizes
from ppcr.tensors import TensorFiles

FAMILIES = {"sam": "sam", "sam2": "sam2", "sam2_video": "sam2"}
"""``model_type`` of a directory's config.json -> architecture. Video models hold the image model whole."""

# What composing adds to the public weights, and training changes.
_OURS = ("prompt_encoder.text.", "mask_decoder.semantic.")
_SAM_VISION = (
    "hidden_size", "output_channels", "num_hidden_layers", "num_attention_heads", "num_channels",
    "image_size", "patch_size", "hidden_act", "layer_norm_eps", "qkv_bias", "use_abs_pos", "use_rel_pos",
    "window_size", "global_attn_indexes", "num_pos_feats", "mlp_dim",
)  # fmt: skip
_SAM2_VISION = (
    "backbone_channel_list", "backbone_feature_sizes", "fpn_hidden_size", "fpn_kernel_size", "fpn_stride",
    "fpn_padding", "fpn_top_down_levels", "num_feature_levels",
)  # fmt: skip
_HIERA = (
    "hidden_size", "num_attention_heads", "num_channels", "image_size", "patch_kernel_size", "patch_stride",
    "patch_padding", "query_stride", "window_positional_embedding_background_size", "num_query_pool_stages",
    "blocks_per_stage", "embed_dim_per_stage", "num_attention_heads_per_stage", "window_size_per_stage",
    "global_attention_blocks", "mlp_ratio", "hidden_act", "layer_norm_eps",
)  # fmt: skip


@dataclass(frozen=True)
class TextPath:
    """What composing adds: sizes of the path for text and points (see `SamConfig`), and the seed."""

    text_dim: int
    max_text: int = 64
    points: bool = False
    seed: int = 0


def load_mobile_sam(path: Path, text: TextPath) -> SamSegmenter:
    """Read the official mobile_sam.pt. Nothing in the file is executed.

    Raises:
        CheckpointError: not a plain state dict, or not MobileSAM's.
    """
    state = from_official(read_state_dict(path))
    config = SamConfig(
        architecture="mobile_sam",
        encoder=asdict(TinyViTSizes()),
        text_dim=text.text_dim,
        max_text=text.max_text,
        points=text.points,
    )
    return assemble(config, state, text.seed, path)


def load_transformers(folder: Path, text: TextPath) -> SamSegmenter:
    """Read a directory of transformers' SamModel, Sam2Model or Sam2VideoModel, sharded or not.

    Raises:
        CheckpointError: of another architecture, incomplete, or its tensors do not fit its config.json.
    """
    values = _config(folder)
    config = _sam2_config(values, text) if _family(values) == "sam2" else _sam_config(values, text)
    tensors = {name: torch.from_numpy(value) for name, value in TensorFiles(folder).items()}
    masks = 1 if config.stability is None else config.mask_tokens
    state = from_transformers(tensors, masks=masks, layers=config.score_layers)
    return assemble(config, state, text.seed, folder)


def _config(folder: Path) -> dict[str, Any]:
    public = "give mobile_sam.pt, or a directory of transformers' SAM or SAM 2"
    missing = f"{folder} holds no config.json: {public}"
    values = read_json(folder / "config.json", CheckpointError, missing=missing, cure=public)
    found = values.get("model_type")
    if found not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(
            f"{folder} holds a {found!r}, which is no segmenter known here: give mobile_sam.pt or a "
            f"directory whose config.json says one of {known}"
        )
    return values


def _family(values: dict[str, Any]) -> str:
    return FAMILIES[values["model_type"]]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A .pt file of nothing but named tensors. Whatever else a pickle may hold is refused, not executed.

    Raises:
        CheckpointError: missing, damaged, or more than tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: give the official mobile_sam.pt") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        kind = type(error).__name__
        raise CheckpointError(
            f"{path} is not a plain state dict, and nothing else is read from a pickle ({kind}): "
            "download the official mobile_sam.pt again"
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds more than named tensors: give the official mobile_sam.pt")
    return {str(name): value for name, value in state.items()}


def assemble(config: SamConfig, state: dict[str, Tensor], seed: int, source: Path) -> SamSegmenter:
    """A segmenter of ``config`` with the weights of ``source``; what reads text is drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SamSegmenter(config)
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in state and not name.startswith(_OURS)]
    foreign = [name for name in state if name not in wanted]
    if missing or foreign:
        told = f"lacks {missing[0]}" if missing else f"has {foreign[0]}, which is not known here"
        what = config.architecture
        raise CheckpointError(f"{source} does not hold the weights of a {what}: as read here, it {told}")
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            shapes = f"{tuple(value.shape)}, its configuration asks for {tuple(wanted[name].shape)}"
            raise CheckpointError(f"{source}: {name} has shape {shapes}; weights and configuration differ")
    model.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, strict=False
    )
    return model.eval()


def _sam_config(values: dict[str, Any], text: TextPath) -> SamConfig:
    from transformers import SamConfig as Public

    public = _public(Public, values)
    vision, decoder = public.vision_config, public.mask_decoder_config
    _require(decoder.hidden_act == "relu", f"mask decoder with {decoder.hidden_act}, relu is known here")
    return SamConfig(
        architecture="sam",
        encoder={name: _plain(getattr(vision, name)) for name in _SAM_VISION},
        image_size=int(vision.image_size),
        patch=int(vision.patch_size),
        norm_eps=decoder.layer_norm_eps,
        **_decoder_sizes(decoder, text),
    )


def _sam2_config(values: dict[str, Any], text: TextPath) -> SamConfig:
    from transformers import Sam2Config as Public

    kept = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    public = _public(Public, {name: values[name] for name in kept if name in values})
    vision, decoder, prompts = public.vision_config, public.mask_decoder_config, public.prompt_encoder_config
    backbone = {name: _plain(getattr(vision.backbone_config, name)) for name in _HIERA}
    model_type = vision.backbone_config.model_type
    _require(model_type == "sam2_hiera_det_model", f"image encoder {model_type!r}, Hiera is known here")
    _require(vision.num_feature_levels == 3, "other than three feature levels")
    _require(decoder.num_hidden_layers == 2, "mask decoder of other than two layers")
    stability = (decoder.dynamic_multimask_stability_delta, decoder.dynamic_multimask_stability_thresh)
    encoder = {name: _plain(getattr(vision, name)) for name in _SAM2_VISION}
    return SamConfig(
        architecture="sam2",
        encoder={**encoder, "backbone_config": {"model_type": model_type, **backbone}},
        image_size=int(prompts.image_size),
        patch=int(prompts.patch_size),
        stability=stability if decoder.dynamic_multimask_via_stability else None,
        **_decoder_sizes(decoder, text),
    )


def _public(kind: Any, values: dict[str, Any]) -> Any:
    try:
        return kind.from_dict(dict(values))
    except Exception as error:  # transformers validates with several libraries' own exceptions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"transformers cannot read this segmenter's config.json: {reason}") from None


def _decoder_sizes(decoder: Any, text: TextPath) -> dict[str, Any]:
    inner = decoder.hidden_size // decoder.attention_downsample_rate
    return {
        "dim": decoder.hidden_size,
        "layers": decoder.num_hidden_layers,
        "heads": decoder.num_attention_heads,
        "head_dim": inner // decoder.num_attention_heads,
        "mlp": decoder.mlp_dim,
        "mask_tokens": decoder.num_multimask_outputs + 1,
        "score_hidden": decoder.iou_head_hidden_dim,
        "score_layers": decoder.iou_head_depth,
        "text_dim": text.text_dim,
        "max_text": text.max_text,
        "points": text.points,
    }


def _require(condition: bool, found: str) -> None:
    if not condition:
        raise CheckpointError(f"this segmenter has a configuration that is not supported: {found}")


def _plain(value: Any) -> Any:
    """A configuration value as JSON has it."""
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError("this segmenter's config.json holds a number that is not finite")
    return value
