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
from ppcr.model.mllm import TinyMLLM, build_mllm, text_hidden, vision_features
from ppcr.model.slot_attention import SLOTS, Layout, slot_attention
from ppcr.model.tokenizer import save_tokenizer, train_tokenizer
from ppcr.prompts import LOCATION_BINS, LOCATIONS_PER_INSTANCE
from ppcr.tokenizer import PromptTokenizer
from ppcr.training.packing import IGNORE, Packer

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


@pytest.mark.parametrize("slots", [((3, 7), (2, 11)), ((1, 1),), ((0, 5), (4, 3))])
def test_slot_attention_equals_masked_attention(slots: tuple[tuple[int, int], ...]) -> None:
    layout = Layout(9, slots)
    owner = torch.zeros(layout.length, dtype=torch.int64)
    for number, (start, length) in enumerate(layout.places, 1):
        owner[start : start + length] = number
    allowed = torch.ones(layout.length, layout.length).tril().bool()
    allowed &= (owner[None] == 0) | (owner[None] == owner[:, None])
    query = torch.randn(2, 4, layout.length, 16)
    key, value = torch.randn(2, 2, 2, layout.length, 16)
    ours, _ = slot_attention(torch.nn.Identity(), query, key, value, layout)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=True)
    torch.testing.assert_close(ours.transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


def test_packed_conversations_equal_separate_stock_forwards(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PromptTokenizer
) -> None:
    rng = np.random.default_rng(5)
    graph = sample_scene("train", 77)
    expressions = sample_expressions(graph, 6, rng)
    packer = Packer(tokenizer, grid=SIZE.grid, objects=14, slots=((3, 40), (2, 72)))
    packed = packer.pack(graph, expressions)
    assert packed.used.sum() >= 4 and (packed.label_reference >= 0).any()
    coordinates = rng.integers(0, LOCATION_BINS, 14 * LOCATIONS_PER_INSTANCE)
    located = coordinates[np.maximum(packed.reference, 0)] + tokenizer.first_location
    ids = torch.from_numpy(np.where(packed.reference >= 0, located, packed.ids))[None]
    patches = torch.randn(1, 256, 384)
    language = model.model.language_model
    previous = language.config._attn_implementation
    with torch.no_grad():
        embeddings = language.embed_tokens(ids)
        features = vision_features(model, patches, SIZE.grid)
        embeddings = embeddings.masked_scatter((ids == tokenizer.image_token)[..., None], features)
        positions = torch.from_numpy(packed.positions)[:, None]
        language.config._attn_implementation = SLOTS
        hidden, _ = text_hidden(language, embeddings, positions, packer.layout, taps=(1,))
        language.config._attn_implementation = previous
        ours = (hidden @ language.embed_tokens.weight.T)[0]
        prefix = list(range(packer.layout.prefix))
        for start, length in (
            place for place, used in zip(packer.layout.places, packed.used, strict=True) if used
        ):
            rows = prefix + list(range(start, start + length))
            alone = ids[:, rows]
            stock = model(
                input_ids=alone,
                attention_mask=torch.ones_like(alone),
                pixel_values=patches[0],
                image_grid_thw=GRID,
                mm_token_type_ids=(alone == tokenizer.image_token).long(),
            ).logits[0]
            torch.testing.assert_close(ours[rows], stock, rtol=1e-3, atol=1e-3)


def test_long_expressions_find_long_slots(tokenizer: PromptTokenizer) -> None:
    graph = sample_scene("train", 5)
    expressions = sample_expressions(graph, 12, np.random.default_rng(1))
    lengths = sorted(
        len(tokenizer.expression(e.text)) + len(tokenizer.encode(e.semantic.text)) for e in expressions
    )
    short = lengths[-3]  # two or more are longer than a short slot
    packed = Packer(tokenizer, grid=8, objects=14, slots=((12, short), (2, 90))).pack(graph, expressions)
    assert packed.used.sum() >= 12
    assert packed.used[-2:].all()


def test_labels_are_the_tokens_that_follow(tokenizer: PromptTokenizer) -> None:
    packer = Packer(tokenizer, grid=8, objects=14, slots=((3, 40), (3, 72)))
    graph = sample_scene("train", 3)
    packed = packer.pack(graph, sample_expressions(graph, 6, np.random.default_rng(0)))
    words = np.nonzero(packed.labels != IGNORE)[0]
    assert len(words) > 10
    assert (packed.ids[words + 1] == packed.labels[words]).all()
    places = np.nonzero(packed.label_reference >= 0)[0]
    inner = places[packed.label_reference[np.minimum(places + 1, packer.layout.length - 1)] >= 0]
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
