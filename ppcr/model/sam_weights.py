"""Names and shapes of public SAM weights, turned into those of `ppcr.model.sam.SamSegmenter`.

Two spellings: that of the official repositories (facebookresearch/segment-anything, ChaoningZhang/MobileSAM),
and that of transformers' SamModel and Sam2Model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Rule = tuple[str, str | Callable[[re.Match[str]], str]]


def _third(match: re.Match[str]) -> str:
    """Layers of a block count their activations here: the n-th of them has the index 2 (n - 1)."""
    return f"{match[1]}{2 * int(match[2]) - 2}."


_TINY_VIT: tuple[Rule, ...] = (
    (r"\.c\.(?=weight)", ".0."),
    (r"\.bn\.", ".1."),
    (r"^image_encoder\.", "image_encoder.model."),
    (r"\.model\.patch_embed\.seq\.", ".model.stem."),
    (r"\.layers\.0\.blocks\.(\d+)\.conv", r".convolutions.\1.body.conv"),
    (r"\.layers\.(\d+)\.downsample\.", r".downsamples.\1."),
    (r"(\.(?:body|downsamples\.\d)\.)conv(\d)\.", _third),
    (r"\.layers\.(\d+)\.blocks\.", lambda m: f".stages.{int(m[1]) - 1}."),
    (r"\.attn\.attention_biases$", ".attention.bias"),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.attn\.", ".attention."),
    (r"(image_encoder.*)\.mlp\.norm\.", r"\1.mlp.0."),
    (r"(image_encoder.*)\.mlp\.fc1\.", r"\1.mlp.1."),
    (r"(image_encoder.*)\.mlp\.fc2\.", r"\1.mlp.3."),
    (r"\.local_conv\.", ".local."),
)
_DECODER: tuple[Rule, ...] = (
    (r"^mask_decoder\.transformer\.", "mask_decoder."),
    (r"\.self_attn\.", ".self_attention."),
    (r"\.cross_attn_token_to_image\.", ".prompt_to_image."),
    (r"\.cross_attn_image_to_token\.", ".image_to_prompt."),
    (r"\.final_attn_token_to_image\.", ".last_prompt_to_image."),
    (r"(mask_decoder.*\.)([qkv])_proj\.", r"\1\2."),
    (r"(mask_decoder.*\.)(?:out|o)_proj\.", r"\1out."),
    (r"(mask_decoder\.layers\.\d\.)(?:layer_)?norm(\d)\.", lambda m: f"{m[1]}norms.{int(m[2]) - 1}."),
    (r"(mask_decoder\.layers\.\d\.mlp\.)(?:lin1|proj_in)\.", r"\g<1>0."),
    (r"(mask_decoder\.layers\.\d\.mlp\.)(?:lin2|proj_out)\.", r"\g<1>2."),
    (r"\.(?:layer_norm_final_attn|norm_final_attn)\.", ".last_norm."),
    (r"\.(?:output_upscaling\.0|upscale_conv1)\.", ".up_0."),
    (r"\.(?:output_upscaling\.1|upscale_layer_norm)\.", ".up_norm."),
    (r"\.(?:output_upscaling\.3|upscale_conv2)\.", ".up_1."),
    (r"\.output_hypernetworks_mlps\.", ".mask_heads."),
    (r"\.iou_prediction_head\.", ".score_head."),
)
_OFFICIAL_HEADS: Rule = (
    r"(_heads\.\d+|_head)\.layers\.(\d+)\.",
    lambda m: f"{m[1]}.{2 * int(m[2])}.",
)
_TRANSFORMERS_HEADS: tuple[Rule, ...] = (
    (r"(_heads\.\d+|_head)\.proj_in\.", r"\1.0."),
    (r"(_heads\.\d+|_head)\.layers\.(\d+)\.", lambda m: f"{m[1]}.{2 * int(m[2]) + 2}."),
)
_PROMPTS: tuple[Rule, ...] = (
    (
        r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$",
        "prompt_encoder.position.frequencies",
    ),
    (r"^shared_image_embedding\.positional_embedding$", "prompt_encoder.position.frequencies"),
    (r"^prompt_encoder\.not_a_point_embed\.weight$", "prompt_encoder.no_point"),
    (r"^prompt_encoder\.no_mask_embed\.weight$", "mask_decoder.no_mask"),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
)
_TRANSFORMERS: tuple[Rule, ...] = (
    (r"^vision_encoder\.", "image_encoder.model."),
    (r"^mask_decoder\.conv_s0\.", "image_encoder.high_1."),
    (r"^mask_decoder\.conv_s1\.", "image_encoder.high_0."),
    (r"^no_memory_embedding$", "image_encoder.no_memory"),
)
# Parts that PPCR has no use for: mask prompts, classification, video memory, the presence of an object.
_LEFT_OUT = re.compile(
    r"^image_encoder\.(norm_head|head)\.|\.mask_downscaling\.|\.mask_embed\.|\.shared_embedding\."
    r"|^(memory_|mask_downsample|object_pointer|temporal_positional|no_memory_positional|no_object_pointer"
    r"|occlusion_spatial)|\.pred_obj_score_head\.|\.attention_bias_idxs$"
)
_FLAT = ("prompt_encoder.no_point", "mask_decoder.no_mask", "image_encoder.no_memory")


def from_official(state: Mapping[str, Tensor], *, masks: int = 1) -> dict[str, Tensor]:
    """The state dict of an official MobileSAM, with ``masks`` of its mask heads."""
    return _convert(state, (*_TINY_VIT, *_DECODER, _OFFICIAL_HEADS, *_PROMPTS), masks)


def from_transformers(state: Mapping[str, Tensor], *, masks: int, layers: int) -> dict[str, Tensor]:
    """The state dict of transformers' SamModel or Sam2Model, with ``masks`` of its mask heads.

    layers: linear layers of the head that predicts scores; a mask head has three.
    """
    last: tuple[Rule, ...] = (
        (r"(_heads\.\d+)\.proj_out\.", r"\1.4."),
        (r"(_head)\.proj_out\.", rf"\g<1>.{2 * layers - 2}."),
    )
    return _convert(state, (*_TRANSFORMERS, *_DECODER, *_TRANSFORMERS_HEADS, *last, *_PROMPTS), masks)


def _convert(state: Mapping[str, Tensor], rules: Iterable[Rule], masks: int) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if _LEFT_OUT.search(name):
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    for name in _FLAT:
        if name in renamed:
            renamed[name] = renamed[name].reshape(-1)
    for name in ("up_0", "up_1"):
        _unfold(renamed, f"mask_decoder.{name}")
    _gather(renamed, "mask_decoder.queries", [f"mask_decoder.{k}.weight" for k in _QUERIES])
    _split_points(renamed)
    return {k: v for k, v in renamed.items() if not _beyond(k, masks)}


_QUERIES = ("obj_score_token", "iou_token", "mask_tokens")


def _gather(state: dict[str, Tensor], name: str, parts: list[str]) -> None:
    found = [state.pop(part) for part in parts if part in state]
    if found:
        state[name] = torch.cat(found)


def _unfold(state: dict[str, Tensor], name: str) -> None:
    """A transposed convolution of kernel and stride 2 as a linear layer to four pixels, row by row."""
    weight, bias = state.get(f"{name}.weight"), state.get(f"{name}.bias")
    if weight is not None and weight.ndim == 4:
        state[f"{name}.weight"] = weight.permute(2, 3, 1, 0).reshape(-1, weight.shape[0]).contiguous()
    if bias is not None:
        state[f"{name}.bias"] = bias.repeat(4)


def _split_points(state: dict[str, Tensor]) -> None:
    """Kinds of points, in SAM's order: background, foreground, upper left and lower right corner."""
    base = "prompt_encoder.point_embed"
    together = state.pop(f"{base}.weight", None)
    if together is None:
        parts = [state.pop(f"{base}.{i}.weight", None) for i in range(4)]
        if any(part is None for part in parts):
            return
        together = torch.cat([part for part in parts if part is not None])
    if together.ndim == 2 and len(together) == 4:
        state["prompt_encoder.point"] = together[1]
        state["prompt_encoder.corners"] = together[2:]


def _beyond(name: str, masks: int) -> bool:
    found = re.match(r"mask_decoder\.mask_heads\.(\d+)\.", name)
    return found is not None and int(found[1]) >= masks
