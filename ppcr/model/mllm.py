"""The prompt MLLM: a stock ``Qwen2_5_VLForConditionalGeneration`` at a tiny configuration.

Nothing is subclassed: the checkpoint loads in transformers, vLLM and TensorRT-LLM as any Qwen2.5-VL does.
``vision_features`` and ``text_hidden`` run the stock modules batch-wise (the stock forward takes one ragged
batch of patches), which is what training needs; a test holds them equal to the stock forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLTextModel,
    apply_rotary_pos_emb_vision,
)

from ppcr.model.slot_attention import Layout
from ppcr.prompts import END_OF_TEXT, IM_END, IMAGE_PAD, LOCATION_BINS, VIDEO_PAD, VISION_END, VISION_START
from ppcr.tokenizer import PromptTokenizer


@dataclass(frozen=True)
class TinyMLLM:
    """Sizes of the tiny Qwen2.5-VL; every derived value is a property.

    Attributes:
        hidden, layers, heads, kv_heads, intermediate: of the text model.
        vision_hidden, vision_layers, vision_heads, vision_intermediate: of the vision tower.
        image_size, patch: sides in pixels; merge: patches merged into a token along a side.
        rope_theta: base of the text model's rotary frequencies.
    """

    hidden: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 704
    vision_hidden: int = 192
    vision_layers: int = 5
    vision_heads: int = 6
    vision_intermediate: int = 512
    image_size: int = 128
    patch: int = 8
    merge: int = 2
    # Positions are few (about a hundred): a small base spreads the width section's angles over 8 columns.
    rope_theta: float = 10.0

    @property
    def head_dim(self) -> int:
        """Width of a head of the text model."""
        return self.hidden // self.heads

    @property
    def grid(self) -> int:
        """Image tokens along one side."""
        return self.image_size // self.patch // self.merge

    @property
    def image_tokens(self) -> int:
        """Tokens an image takes."""
        return self.grid**2

    @property
    def mrope_section(self) -> list[int]:
        """Pairs of a head that turn with time, row and column; they sum to head_dim / 2."""
        pairs = self.head_dim // 2
        return [pairs // 4, 3 * pairs // 8, 3 * pairs // 8]


def tiny_config(size: TinyMLLM, tokenizer: PromptTokenizer) -> Qwen2_5_VLConfig:
    """The Hugging Face configuration of a tiny MLLM over ``tokenizer``'s vocabulary."""
    vocabulary = -(-tokenizer.tokenizer.get_vocab_size(with_added_tokens=True) // 64) * 64

    def token(text: str) -> int:
        found = tokenizer.tokenizer.token_to_id(text)
        assert found is not None, text  # PromptTokenizer has checked its special tokens
        return found

    text = {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "intermediate_size": size.intermediate,
        "vocab_size": vocabulary,
        "max_position_embeddings": 1024,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": size.rope_theta,
            "mrope_section": size.mrope_section,
        },
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": token(END_OF_TEXT),
        "eos_token_id": token(IM_END),
        "pad_token_id": token(END_OF_TEXT),
    }
    vision = {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "num_heads": size.vision_heads,
        "intermediate_size": size.vision_intermediate,
        "out_hidden_size": size.hidden,
        "patch_size": size.patch,
        "spatial_merge_size": size.merge,
        "temporal_patch_size": 2,
        "window_size": size.image_size,
        "fullatt_block_indexes": list(range(size.vision_layers)),
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token(IMAGE_PAD),
        video_token_id=token(VIDEO_PAD),
        vision_start_token_id=token(VISION_START),
        vision_end_token_id=token(VISION_END),
        tie_word_embeddings=True,
    )


def build_mllm(
    size: TinyMLLM, tokenizer: PromptTokenizer, *, seed: int = 0
) -> Qwen2_5_VLForConditionalGeneration:
    """A fresh tiny MLLM, float32, with its places initialised (see ``initialise_places``)."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        tiny_config(size, tokenizer), attn_implementation="sdpa"
    )
    initialise_places(model, size, tokenizer)
    return model


@torch.no_grad()
def initialise_places(
    model: Qwen2_5_VLForConditionalGeneration,
    size: TinyMLLM,
    tokenizer: PromptTokenizer,
    *,
    features: int = 32,
) -> None:
    """Give locations an order, and image tokens their place, before training.

    Rotary positions are relative, so an image token's own column and row are not in its features. Two heads
    of the first layer start as look-ups: attending, at the fixed distance between ruler and image, to the
    ruler token of the same column (row), they copy its Fourier code into a subspace of the hidden state.
    Without this a tiny model spends most of its training finding out where its tokens are.
    """
    language = model.model.language_model
    table = language.embed_tokens.weight
    frequencies = 0.25 * 128.0 ** (torch.arange(features // 2) / (features // 2 - 1))
    angles = 2 * torch.pi * torch.arange(LOCATION_BINS)[:, None] / LOCATION_BINS * frequencies
    code = torch.cat([angles.cos(), angles.sin()], 1) / (features // 2) ** 0.5  # [1000, features], unit rows
    basis = torch.linalg.qr(torch.randn(size.hidden, 3 * features))[0]  # orthonormal columns
    shared, column, row = basis.split(features, dim=1)
    first = tokenizer.first_location
    table[first : first + LOCATION_BINS] = code @ shared.T

    prefix = tokenizer.before_image
    distance = len(prefix) - next(i for i, t in enumerate(prefix) if t >= first)
    pairs = size.head_dim // 2
    theta = size.rope_theta ** (-torch.arange(pairs) / pairs)
    time, height, width = size.mrope_section
    attention = language.layers[0].self_attn
    group = size.heads // size.kv_heads
    for kv_head, section, strength, place in (
        (0, slice(time + height, time + height + width), 12.0, column),
        (1, slice(time, time + height), 6.0, row),
    ):
        query_start, key_start = kv_head * group * size.head_dim, kv_head * size.head_dim
        angle = theta[section] * distance
        low = torch.arange(pairs)[section]
        attention.q_proj.bias[query_start + low] = strength * angle.cos()
        attention.q_proj.bias[query_start + low + pairs] = -strength * angle.sin()
        attention.k_proj.bias[key_start + low] = strength
        attention.v_proj.weight[key_start : key_start + features] = shared.T / size.hidden**0.5
        attention.o_proj.weight[:, query_start : query_start + features] = place


def vision_features(model: Qwen2_5_VLForConditionalGeneration, patches: Tensor, grid: int) -> Tensor:
    """Image tokens of a batch of equal-size images.

    Args:
        patches: float32 [B, n, 3*2*patch*patch], ordered as ``ppcr.images.patchify`` does.
        grid: image tokens along one side; n = (2 * grid)**2.

    Returns:
        [B, grid * grid, hidden].
    """
    visual = model.model.visual
    batch, count, _ = patches.shape
    weight = visual.patch_embed.proj.weight
    x = F.linear(patches, weight.flatten(1))
    cos, sin = visual.rotary_pos_emb(x, _patch_positions(grid, visual.spatial_merge_size, x.device))
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).view(batch, count, 3, attention.num_heads, -1)
        q, k = apply_rotary_pos_emb_vision(qkv[:, :, 0], qkv[:, :, 1], cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, qkv[:, :, 2]))
        out = _attend(q, k, v)
        x = x + attention.proj(out.reshape(batch, count, -1))
        x = x + block.mlp(block.norm2(x))
    return visual.merger(x).view(batch, grid * grid, -1)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention [B, H, n, D] -> [B, n, H, D]; on a CPU as plain products, see ``slot_attention``."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    shares = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1).to(value.dtype)
    return (shares @ value).transpose(1, 2)


def _patch_positions(grid: int, merge: int, device: torch.device) -> Tensor:
    """int64 [n, 2] row and column of each patch, in merge-block order."""
    index = torch.arange(grid * merge, device=device)
    rows, columns = torch.meshgrid(index, index, indexing="ij")
    places = torch.stack([rows, columns], -1).view(grid, merge, grid, merge, 2)
    return places.permute(0, 2, 1, 3, 4).reshape(-1, 2)


def text_hidden(
    language: Qwen2_5_VLTextModel,
    embeddings: Tensor,
    positions: Tensor,
    mask: Tensor | Layout,
    *,
    taps: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Hidden states of packed conversations.

    Args:
        embeddings: [B, T, hidden].
        positions: int64 [3, B, T] multimodal rotary positions (time, height, width).
        mask: bool [B, 1, T, T], True = may attend; or a layout, where the model's attention is ``SLOTS``.
        taps: also return the hidden states after these numbers of layers.

    Returns:
        final (after the last norm) and tapped hidden states, each [B, T, hidden].
    """
    rotary = language.rotary_emb(embeddings, positions)
    hidden, tapped = embeddings, {}
    for index, layer in enumerate(language.layers):
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        if index + 1 in taps:
            tapped[index + 1] = hidden
    return language.norm(hidden), [tapped[tap] for tap in taps]
