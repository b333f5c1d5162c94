"""The training-side forward of the tiny MLLM equals the stock Qwen2.5-VL forward, packed or not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from ppcr.data.expressions import sample_expressions
from ppcr.data.graph import sample_scene
from ppcr.model.checkpoint import load_mllm, save_mllm
from ppcr.model.mllm import PLAIN, TinyMLLM, build_mllm, plain_attention, text_hidden, vision_features
from ppcr.model.tokenizer import save_tokenizer, train_tokenizer
from ppcr.prompts import LOCATION_BINS, LOCATIONS_PER_INSTANCE
from ppcr.tokenizer import PromptTokenizer
from ppcr.training.packing import IGNORE, Packer, attention_mask, stack

SIZE = TinyMLLM(layers=2, vision_layers=2, intermediate=128, vision_intermediate=128)
GRID = torch.tensor([[1, 16, 16]])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [
        text
        for seed in range(60)
        for e in sample_expressions(sample_scene("train", seed), 4, np.random.default_rng(seed))
        for text in (e.text, e.semantic.text)
    ]
    save_tokenizer(train_tokenizer(lines), folder)
    return PromptTokenizer.load(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def model(tokenizer: PromptTokenizer) -> Qwen2_5_VLForConditionalGeneration:
    built = build_mllm(SIZE, tokenizer)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)  # fresh weights give nearly flat logits, which hide differences
    return built.eval()


def test_vision_features_equal_the_stock_tower(model: Qwen2_5_VLForConditionalGeneration) -> None:
    patches = torch.randn(3, 256, 384)
    with torch.no_grad():
        ours = vision_features(model, patches, SIZE.grid)
        stock = model.model.visual(patches.flatten(0, 1), grid_thw=GRID.repeat(3, 1)).pooler_output
    torch.testing.assert_close(ours.flatten(0, 1), stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", [1, 7, 33])
def test_plain_attention_equals_torch(length: int) -> None:
    query, key, value = torch.randn(2, 4, length, 16), torch.randn(2, 2, 21, 16), torch.randn(2, 2, 21, 16)
    allowed = torch.rand(2, 1, length, 21) > 0.4
    allowed[..., 0] = True
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, -1e4)
    ours, _ = plain_attention(torch.nn.Identity(), query, key, value, additive)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=True)
    torch.testing.assert_close(ours.transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", PLAIN])
def test_packed_conversations_equal_separate_stock_forwards(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PromptTokenizer, attention: str
) -> None:
    rng = np.random.default_rng(5)
    graph = sample_scene("train", 77)
    expressions = sample_expressions(graph, 5, rng)
    packer = Packer(tokenizer, grid=SIZE.grid, length=400, objects=14, conversations=5)
    packed = packer.pack(expressions)
    placed = int(packed.segment.max())
    assert placed >= 3
    batch = stack([packed])
    coordinates = rng.integers(0, LOCATION_BINS, 14 * LOCATIONS_PER_INSTANCE)
    located = coordinates[np.maximum(packed.reference, 0)] + tokenizer.first_location
    ids = torch.from_numpy(np.where(packed.reference >= 0, located, packed.ids))[None]
    patches = torch.randn(1, 256, 384)
    language = model.model.language_model
    mask = torch.from_numpy(attention_mask(batch["segment"]))
    previous = language.config._attn_implementation
    with torch.no_grad():
        embeddings = language.embed_tokens(ids)
        features = vision_features(model, patches, SIZE.grid)
        embeddings = embeddings.masked_scatter((ids == tokenizer.image_token)[..., None], features)
        language.config._attn_implementation = attention
        if attention == PLAIN:
            mask = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
        hidden, _ = text_hidden(
            language, embeddings, torch.from_numpy(batch["positions"]).transpose(0, 1), mask, taps=(1,)
        )
        language.config._attn_implementation = previous
        ours = (hidden @ language.embed_tokens.weight.T)[0]
        for number in range(1, placed + 1):
            rows = (packed.segment == 0) | (packed.segment == number)
            alone = ids[:, torch.from_numpy(rows)]
            stock = model(
                input_ids=alone,
                attention_mask=torch.ones_like(alone),
                pixel_values=patches[0],
                image_grid_thw=GRID,
                mm_token_type_ids=(alone == tokenizer.image_token).long(),
            ).logits[0]
            torch.testing.assert_close(ours[torch.from_numpy(rows)], stock, rtol=1e-3, atol=1e-3)


def test_labels_are_the_tokens_that_follow(tokenizer: PromptTokenizer) -> None:
    packer = Packer(tokenizer, grid=8, length=400, objects=14, conversations=6)
    packed = packer.pack(sample_expressions(sample_scene("train", 3), 6, np.random.default_rng(0)))
    words = np.nonzero(packed.labels != IGNORE)[0]
    assert len(words) > 10
    assert (packed.ids[words + 1] == packed.labels[words]).all()
    places = np.nonzero(packed.label_reference >= 0)[0]
    followed = places[packed.segment[np.minimum(places + 1, 399)] == packed.segment[places]]
    inner = followed[packed.reference[followed + 1] >= 0]
    assert len(inner) and (packed.reference[inner + 1] == packed.label_reference[inner]).all()


def test_saved_model_loads_with_the_same_logits_and_reads_in_both_versions(
    model: Qwen2_5_VLForConditionalGeneration, tmp_path: Path
) -> None:
    save_mllm(model, tmp_path)
    again = load_mllm(tmp_path)
    ids = torch.randint(0, 500, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (
        config["rope_scaling"]["mrope_section"] == config["text_config"]["rope_parameters"]["mrope_section"]
    )
    assert config["hidden_size"] == SIZE.hidden and config["rope_theta"] == SIZE.rope_theta


def test_any_text_survives_the_tokenizer(tokenizer: PromptTokenizer) -> None:
    for text in ("the red cube", "naïve café 🙂 שלום", "a\tb  c", "<| im_end |>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
