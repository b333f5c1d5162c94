"""Zero-shot prompts: the ids a processor gives, each family's constraints, boxes there and back."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ppcr import boxes as frames
from ppcr.config import MLLMConfig, PPCRConfig
from ppcr.errors import BoxError, BundleError, CheckpointError
from ppcr.pretrained import RESOLUTIONS, mllm_config
from ppcr.prompts import COUNT_WORDS, SPECIAL_TOKENS, SemanticPrompt, SpatialPrompt
from ppcr.zero_shot import CONVENTIONS, ZeroShotTokenizer, tokenizer_of
from runtime.positions import positions
from tests import factory
from tests.families import Conversation, Small, save

PROCESSORS: dict[str, Any] = {"qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}


@pytest.fixture(params=CONVENTIONS)
def tokenizer(request: pytest.FixtureRequest) -> ZeroShotTokenizer:
    family = request.param
    return ZeroShotTokenizer(factory.tokenizer().tokenizer, family, CONVENTIONS[family])


def family_of(tokenizer: ZeroShotTokenizer) -> str:
    return next(family for family, convention in CONVENTIONS.items() if convention == tokenizer.convention)


@pytest.mark.parametrize("expression", ["the red cube.", "2 dogs, left of the 3rd chair!", "Ünïcode – 貓"])
def test_ids_equal_the_processor(tokenizer: ZeroShotTokenizer, expression: str) -> None:
    family = family_of(tokenizer)
    rng = np.random.default_rng()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer.tokenizer)
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    images = Qwen2VLImageProcessorPil(patch_size=14 if family == "qwen2_5_vl" else 16)
    # Never asked for anything; a real one needs torchvision.
    videos = object.__new__(transformers.BaseVideoProcessor)
    theirs = PROCESSORS[family](image_processor=images, tokenizer=fast, video_processor=videos)
    texts = tokenizer.conversation
    text = f"{texts.before_image}<|image_pad|>{texts.after_image}{expression.lower()}{texts.after_expression}"
    height, width = rng.integers(28, 400, 2)
    picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    inputs = theirs(text=[text], images=[picture], return_tensors="np")
    image_tokens = int(inputs["image_grid_thw"].prod()) // 4
    mine = tokenizer.prefix(image_tokens) + tokenizer.expression(expression)
    assert inputs["input_ids"][0].tolist() == mine


def test_chat_form(tokenizer: ZeroShotTokenizer) -> None:
    """Qwen2.5-VL's template opens with a system turn of its own, Qwen3-VL's with the user's."""
    opening = tokenizer.conversation.before_image
    assert opening.startswith("<|im_start|>system") == (family_of(tokenizer) == "qwen2_5_vl")
    assert opening.endswith("<|im_start|>user\n<|vision_start|>")


@pytest.mark.parametrize("count", range(1, len(COUNT_WORDS)))
def test_boxes_round_trip(tokenizer: ZeroShotTokenizer, count: int) -> None:
    """Original pixels to what the model writes and back, within half of one of its steps."""
    rng = np.random.default_rng()
    for _ in range(20):
        height, width = rng.integers(28, 4000, 2)
        size = RESOLUTIONS[family_of(tokenizer)][rng.integers(5)]
        corners = rng.uniform(0, 0.9, (count, 2))
        unit = np.concatenate([corners, corners + rng.uniform(0.02, 0.1, (count, 2))], 1).astype(np.float32)
        pixels = frames.to_pixels(unit, width, height)
        prompt = SpatialPrompt(frames.to_unit(pixels, width, height), unit[:, :2])
        ids = tokenizer.spatial_ids(prompt, size)
        read = tokenizer.spatial(ids, size)
        assert read.count == count
        step = np.array([size[1], size[0]] if tokenizer.convention == "pixels" else [1000, 1000])
        off = np.abs(read.boxes - unit) * np.tile(step, 2)
        assert off.max() <= 0.51
        back = frames.to_pixels(read.boxes, width, height)
        assert (np.abs(back - pixels) <= 0.51 * np.tile([width, height], 2) / np.tile(step, 2) + 1e-3).all()
        np.testing.assert_allclose(read.points, (read.boxes[:, :2] + read.boxes[:, 2:]) / 2, atol=1e-6)
        # What the model would write is what it may write.
        cursor = tokenizer.spatial_constraint(count).start()
        for token in ids:
            cursor.advance(token)
        assert cursor.done
        pattern = tokenizer.spatial_constraint(count).regex(tokenizer.decode)
        assert re.fullmatch(pattern, tokenizer.decode(ids))


def test_conventions_differ_where_they_must() -> None:
    box, size = [[0.5, 0.25, 1.0, 0.75]], (448, 672)
    assert frames.to_written(box, "pixels", size).tolist() == [[336, 112, 672, 336]]
    assert frames.to_written(box, "thousandths", size).tolist() == [[500, 250, 1000, 750]]
    assert frames.to_written([[-1, 0, 2, 1]], "thousandths", size).tolist() == [[0, 0, 1000, 1000]]
    with pytest.raises(BoxError, match="unknown convention"):
        frames.to_written(box, "inches", size)
    with pytest.raises(BoxError, match="finite"):
        frames.to_written([[0, 0, float("nan"), 1]], "pixels", size)


def test_any_answer_within_the_constraint_is_a_box(tokenizer: ZeroShotTokenizer) -> None:
    """Corners out of order, outside the image, or all the same: the segmenter gets something it can use."""
    rng = np.random.default_rng()
    for _ in range(30):
        cursor, ids = tokenizer.spatial_constraint(2).start(), list[int]()
        while not cursor.done:
            for token in cursor.forced() or (int(rng.choice(cursor.allowed())),):
                cursor.advance(token)
                ids.append(token)
        read = tokenizer.spatial(ids, (448, 448))
        assert read.count == 2
        assert ((read.boxes >= 0) & (read.boxes <= 1)).all()
        assert (read.boxes[:, 2:] > read.boxes[:, :2]).all()


def test_only_digits_are_decided(tokenizer: ZeroShotTokenizer) -> None:
    cursor, decisions = tokenizer.spatial_constraint(1).start(), 0
    while not cursor.done:
        forced = cursor.forced()
        decisions += not forced
        for token in forced or (int(cursor.allowed()[0]),):
            cursor.advance(token)
    # The first digit of each number and whether it goes on; here every number takes all its digits.
    assert decisions <= 4 * 4


@pytest.mark.parametrize("count", range(len(COUNT_WORDS)))
def test_semantic_answers(tokenizer: ZeroShotTokenizer, count: int) -> None:
    prompt = SemanticPrompt("cube", "red", "left of the sphere", count)
    ids = tokenizer.encode(prompt.text)
    cursor = tokenizer.semantic_constraint.start()
    for token in ids:
        cursor.advance(token)
    assert cursor.done
    assert tokenizer.semantic(ids) == prompt
    assert tokenizer.semantic(ids).is_none == (count == 0)


def test_tokenizers_that_do_not_fit_are_refused() -> None:
    words = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *map(str, range(10)), "01"))}
    joined = Tokenizer(models.BPE(words, [("0", "1")]))
    joined.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(BundleError, match="joins digits"):
        ZeroShotTokenizer(joined, "qwen3_vl", "thousandths")


def test_the_checkpoint_says_which(tmp_path: Any) -> None:
    path = tmp_path / "tokenizer.json"
    factory.tokenizer().tokenizer.save(str(path))
    zero_shot = PPCRConfig(box_convention="thousandths", mllm=MLLMConfig(family="qwen3_vl"))
    made = tokenizer_of(zero_shot, path)
    assert isinstance(made, ZeroShotTokenizer) and made.convention == "thousandths"
    assert not isinstance(tokenizer_of(PPCRConfig(), path), ZeroShotTokenizer)
    assert PPCRConfig.from_dict(zero_shot.to_dict()) == zero_shot


@pytest.mark.parametrize("family", CONVENTIONS)
def test_public_directories_describe_themselves(family: str, tmp_path: Any) -> None:
    save(Small(family).build(), tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    made = mllm_config(tmp_path)
    assert (made.family, made.resolutions, made.resample) == (family, RESOLUTIONS[family], "bicubic")
    assert made.mean == (0.1, 0.2, 0.3)
    assert made.patch == (14 if family == "qwen2_5_vl" else 16)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(CheckpointError, match="'llava'"):
        mllm_config(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        mllm_config(tmp_path)


@pytest.mark.parametrize("family", CONVENTIONS)
def test_positions_of_any_grid_equal_transformers(family: str) -> None:
    size = Small(family, hidden=32, intermediate=32, layers=1, heads=2, kv_heads=1, head_dim=16)
    model = size.build().model
    rng = np.random.default_rng()
    for _ in range(25):
        grid = int(rng.integers(1, 40)), int(rng.integers(1, 40))
        ids = Conversation.random(size, int(rng.integers(4, 40)), grid).ids
        prompt, thw = torch.tensor([ids]), torch.tensor([[1, 2 * grid[0], 2 * grid[1]]])
        kinds = (prompt == 3).long()
        wanted, delta = model.get_rope_index(prompt, mm_token_type_ids=kinds, image_grid_thw=thw)
        got = positions(len(ids) + 5, ids.index(3), grid)
        np.testing.assert_array_equal(got[:, : len(ids)], wanted[:, 0].numpy())
        # What follows goes on at transformers' offset, as the second turn does.
        np.testing.assert_array_equal(got[:, len(ids) :], [np.arange(5) + len(ids) + int(delta)] * 3)
