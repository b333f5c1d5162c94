"""Small SAM models of fresh random weights, as the public packages spell them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ppcr.model.sam_config import SamConfig
from ppcr.model.tiny_vit import TinyViTSizes

SIDE, TEXT = 64, 24
TINY_VIT = TinyViTSizes(dims=(8, 16, 20, 40), depths=(1, 2, 2, 1), heads=(2, 5, 4), windows=(7, 3, 4))
_DIM, _MLP = 32, 48

SAM = {
    "model_type": "sam",
    "vision_config": {
        "hidden_size": 32, "output_channels": _DIM, "num_hidden_layers": 3, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": 16, "window_size": 3, "global_attn_indexes": [1], "mlp_dim": 48,
        "num_pos_feats": _DIM // 2,
    },
    "prompt_encoder_config": {
        "hidden_size": _DIM, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 8,
    },
    "mask_decoder_config": {
        "hidden_size": _DIM, "mlp_dim": _MLP, "num_attention_heads": 4, "iou_head_hidden_dim": 40,
    },
}  # fmt: skip
SAM2 = {
    "model_type": "sam2",
    "vision_config": {
        "model_type": "sam2_vision_model", "fpn_hidden_size": _DIM, "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[SIDE // 4] * 2, [SIDE // 8] * 2, [SIDE // 16] * 2],
        "backbone_config": {
            "model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1,
            "image_size": [SIDE, SIDE], "blocks_per_stage": [1, 2, 2, 1],
            "embed_dim_per_stage": [8, 16, 32, 64],
            "num_attention_heads_per_stage": [1, 2, 4, 8], "window_size_per_stage": [8, 4, 4, 2],
            "global_attention_blocks": [4], "window_positional_embedding_background_size": [7, 7],
        },
    },
    "prompt_encoder_config": {
        "hidden_size": _DIM, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 8,
    },
    "mask_decoder_config": {
        "hidden_size": _DIM, "mlp_dim": _MLP, "num_attention_heads": 4, "iou_head_hidden_dim": 40,
    },
}  # fmt: skip


def public_model(values: dict[str, Any], seed: int) -> Any:
    """transformers' SamModel or Sam2Model with weights large enough that every part of it tells."""
    from transformers import Sam2Config, Sam2Model, SamModel
    from transformers import SamConfig as PublicSamConfig

    copy = json.loads(json.dumps(values))
    torch.manual_seed(seed)
    if values["model_type"] == "sam":
        model: Any = SamModel._from_config(PublicSamConfig(**copy), attn_implementation="eager")
    else:
        model = Sam2Model._from_config(Sam2Config(**copy), attn_implementation="eager")
    shake(model)
    if values["model_type"] == "sam":
        # Two names of one matrix, which transformers ties.
        model.prompt_encoder.shared_embedding.positional_embedding.data.copy_(
            model.shared_image_embedding.positional_embedding.data
        )
    else:
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(
            model.shared_image_embedding.positional_embedding
        )
    return model.eval()


def shake(model: torch.nn.Module) -> None:
    """Weights of unit gain, norms and biases other than those of a fresh model."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(0, 1.4 / max(1, value[0].numel()) ** 0.5)
            elif name.endswith("weight"):
                value.uniform_(0.6, 1.4)
            else:
                value.normal_(0, 0.2)


def save_public(model: Any, folder: Path, *, shards: int = 1) -> Path:
    """config.json and safetensors as transformers lays them out, in one file or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    values = json.loads(model.config.to_json_string())
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    state = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(state)}
    for file in set(where.values()):
        save_file({k: v for k, v in state.items() if where[k] == file}, folder / file)
    index = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return folder


def mobile_sam_config(**changes: Any) -> SamConfig:
    """A small MobileSAM with the decoder of `SAM`."""
    sizes: dict[str, Any] = {
        "encoder": asdict(TINY_VIT), "image_size": SIDE, "dim": _DIM, "heads": 4, "head_dim": 4, "mlp": _MLP,
        "score_hidden": 40, "norm_eps": 1e-6, "text_dim": TEXT, "text_layers": 1, "text_tokens": 4,
        "max_text": 16,
    }  # fmt: skip
    return SamConfig(**{**sizes, **changes})


def official_tiny_vit(sizes: TinyViTSizes, out: int, seed: int) -> dict[str, Tensor]:
    """Random weights of an image encoder as mobile_sam.pt names them."""
    g = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def put(name: str, *shape: int) -> None:
        fan_in = max(1, int(torch.tensor(shape[1:]).prod())) if len(shape) > 1 else 1
        state[f"image_encoder.{name}"] = torch.randn(*shape, generator=g) * 1.4 / fan_in**0.5

    def norm(name: str, dim: int) -> None:
        state[f"image_encoder.{name}.weight"] = 0.6 + 0.8 * torch.rand(dim, generator=g)
        state[f"image_encoder.{name}.bias"] = 0.2 * torch.randn(dim, generator=g)

    def conv(name: str, into: int, of: int, kernel: int) -> None:
        put(f"{name}.c.weight", into, of, kernel, kernel)
        norm(f"{name}.bn", into)
        state[f"image_encoder.{name}.bn.running_mean"] = 0.3 * torch.randn(into, generator=g)
        state[f"image_encoder.{name}.bn.running_var"] = 0.5 + torch.rand(into, generator=g)
        state[f"image_encoder.{name}.bn.num_batches_tracked"] = torch.tensor(7)

    def linear(name: str, into: int, of: int) -> None:
        put(f"{name}.weight", into, of)
        put(f"{name}.bias", into)

    dims = sizes.dims
    conv("patch_embed.seq.0", dims[0] // 2, 3, 3)
    conv("patch_embed.seq.2", dims[0], dims[0] // 2, 3)
    for i in range(sizes.depths[0]):
        hidden = sizes.expand * dims[0]
        conv(f"layers.0.blocks.{i}.conv1", hidden, dims[0], 1)
        conv(f"layers.0.blocks.{i}.conv2", hidden, 1, 3)
        conv(f"layers.0.blocks.{i}.conv3", dims[0], hidden, 1)
    for s in range(3):
        conv(f"layers.{s}.downsample.conv1", dims[s + 1], dims[s], 1)
        conv(f"layers.{s}.downsample.conv2", dims[s + 1], 1, 3)
        conv(f"layers.{s}.downsample.conv3", dims[s + 1], dims[s + 1], 1)
    for s, dim in enumerate(dims[1:], 1):
        for i in range(sizes.depths[s]):
            block, window = f"layers.{s}.blocks.{i}", sizes.windows[s - 1]
            put(f"{block}.attn.attention_biases", sizes.heads[s - 1], window * window)
            norm(f"{block}.attn.norm", dim)
            linear(f"{block}.attn.qkv", 3 * dim, dim)
            linear(f"{block}.attn.proj", dim, dim)
            norm(f"{block}.mlp.norm", dim)
            linear(f"{block}.mlp.fc1", sizes.expand * dim, dim)
            linear(f"{block}.mlp.fc2", dim, sizes.expand * dim)
            conv(f"{block}.local_conv", dim, 1, 3)
    norm("norm_head", dims[-1])
    linear("head", 10, dims[-1])
    put("neck.0.weight", out, dims[-1], 1, 1)
    norm("neck.1", out)
    put("neck.2.weight", out, out, 3, 3)
    norm("neck.3", out)
    return state


def official_decoder(public: Any) -> dict[str, Tensor]:
    """The prompt encoder and mask decoder of a transformers' SamModel under the official names."""
    state: dict[str, Tensor] = {}
    for name, value in public.state_dict().items():
        if name.startswith("vision_encoder."):
            continue
        if name == "shared_image_embedding.positional_embedding":
            state["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"] = value
            continue
        if ".shared_embedding." in name:
            continue
        for theirs, official in _SPELLINGS:
            name = name.replace(theirs, official)
        state[name] = value
    return state


_SPELLINGS = (
    ("prompt_encoder.point_embed.", "prompt_encoder.point_embeddings."),
    ("mask_embed.conv1", "mask_downscaling.0"), ("mask_embed.layer_norm1", "mask_downscaling.1"),
    ("mask_embed.conv2", "mask_downscaling.3"), ("mask_embed.layer_norm2", "mask_downscaling.4"),
    ("mask_embed.conv3", "mask_downscaling.6"), ("layer_norm_final_attn", "norm_final_attn"),
    ("layer_norm", "norm"), ("upscale_conv1", "output_upscaling.0"), ("upscale_norm", "output_upscaling.1"),
    ("upscale_conv2", "output_upscaling.3"), ("layers.0.weight", "layers.1.weight"),
    ("layers.0.bias", "layers.1.bias"), ("proj_in", "layers.0"), ("proj_out", "layers.2"),
)  # fmt: skip


def mobile_sam_state(public: Any, seed: int) -> dict[str, Tensor]:
    """A whole small MobileSAM in the official spelling, with the decoder of ``public``."""
    return {**official_tiny_vit(TINY_VIT, _DIM, seed), **official_decoder(public)}
