"""The SAM family: equal to public code, unchanged by an untrained text path, strict on loading."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ppcr.errors import CheckpointError
from ppcr.model.prompt_encoder import Prompts
from ppcr.model.sam import SamSegmenter
from ppcr.model.sam_config import SamConfig
from ppcr.model.sam_features import PlainFeatures
from ppcr.model.sam_import import TextPath, assemble, load_mobile_sam, load_transformers, read_state_dict
from ppcr.model.sam_weights import from_official
from ppcr.model.segmenters import load_segmenter
from ppcr.model.tiny_vit import TinyViTSizes
from tests import sam_factory as factory
from tests.sam_factory import SIDE, TEXT

PATH = TextPath(text_dim=TEXT, max_text=16)
FAMILIES = {"sam": factory.SAM, "sam2": factory.SAM2}


def tiny_vit_by_hand(state: dict[str, Tensor], sizes: TinyViTSizes, pixels: Tensor) -> Tensor:
    """TinyViT from its paper and the official names, window by window and head by head."""

    def get(name: str) -> Tensor:
        return state[f"image_encoder.{name}"]

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = get(f"{name}.c.weight")
        groups = x.shape[1] if weight.shape[1] == 1 and x.shape[1] > 1 else 1
        x = F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, groups)
        mean, var = get(f"{name}.bn.running_mean"), get(f"{name}.bn.running_var")
        return F.batch_norm(x, mean, var, get(f"{name}.bn.weight"), get(f"{name}.bn.bias"))

    def norm(x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, get(f"{name}.weight"), get(f"{name}.bias"))

    def attention(x: Tensor, name: str, heads: int, window: int) -> Tensor:
        """[w*w, C] -> [w*w, C]"""
        parts = linear(norm(x, f"{name}.norm"), f"{name}.qkv")
        width, answers = x.shape[1] // heads, []
        for head in range(heads):
            q, k, v = parts[:, 3 * head * width : 3 * (head + 1) * width].split(width, dim=1)
            scores = q @ k.T * width**-0.5
            for i in range(window**2):
                for j in range(window**2):
                    down, right = abs(i // window - j // window), abs(i % window - j % window)
                    scores[i, j] += get(f"{name}.attention_biases")[head, down * window + right]
            answers.append(scores.softmax(1) @ v)
        return linear(torch.cat(answers, 1), f"{name}.proj")

    x = conv(F.gelu(conv(pixels, "patch_embed.seq.0", 2)), "patch_embed.seq.2", 2)
    for i in range(sizes.depths[0]):
        y = F.gelu(conv(x, f"layers.0.blocks.{i}.conv1"))
        y = conv(F.gelu(conv(y, f"layers.0.blocks.{i}.conv2")), f"layers.0.blocks.{i}.conv3")
        x = F.gelu(x + y)
    for stage in range(1, 4):
        down = f"layers.{stage - 1}.downsample"
        x = F.gelu(conv(x, f"{down}.conv1"))
        x = conv(F.gelu(conv(x, f"{down}.conv2", sizes.strides[stage - 1])), f"{down}.conv3")
        heads, window = sizes.heads[stage - 1], sizes.windows[stage - 1]
        for i in range(sizes.depths[stage]):
            block, (b, c, height, width) = f"layers.{stage}.blocks.{i}", x.shape
            rows, columns = -(-height // window), -(-width // window)
            padded = torch.zeros(b, rows * window, columns * window, c)
            padded[:, :height, :width] = x.permute(0, 2, 3, 1)
            for n in range(b):
                for r in range(0, rows * window, window):
                    for s in range(0, columns * window, window):
                        part = padded[n, r : r + window, s : s + window].reshape(-1, c)
                        done = attention(part, f"{block}.attn", heads, window)
                        padded[n, r : r + window, s : s + window] = done.reshape(window, window, c)
            x = conv(x + padded[:, :height, :width].permute(0, 3, 1, 2), f"{block}.local_conv")
            rows_of = x.permute(0, 2, 3, 1)
            y = F.gelu(linear(norm(rows_of, f"{block}.mlp.norm"), f"{block}.mlp.fc1"))
            x = (rows_of + linear(y, f"{block}.mlp.fc2")).permute(0, 3, 1, 2)
    x = F.conv2d(x, get("neck.0.weight"))
    x = norm(x.permute(0, 2, 3, 1), "neck.1", 1e-6).permute(0, 3, 1, 2)
    x = F.conv2d(x, get("neck.2.weight"), padding=1)
    return norm(x.permute(0, 2, 3, 1), "neck.3", 1e-6).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def public() -> dict[str, Any]:
    """transformers' models, by family."""
    return {name: factory.public_model(values, seed=11) for name, values in FAMILIES.items()}


@pytest.fixture(scope="module")
def folders(public: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("public")
    return {name: factory.save_public(model, root / name) for name, model in public.items()}


@pytest.fixture(scope="module")
def mobile_sam(public: dict[str, Any]) -> SamSegmenter:
    state = factory.mobile_sam_state(public["sam"], seed=5)
    return assemble(factory.mobile_sam_config(), from_official(state), 0, Path("mobile_sam.pt"))


@pytest.fixture(scope="module")
def segmenters(folders: dict[str, Path], mobile_sam: SamSegmenter) -> dict[str, SamSegmenter]:
    read = {name: load_transformers(folder, PATH) for name, folder in folders.items()}
    return {**read, "mobile_sam": mobile_sam}


def pixels(count: int = 1, seed: int = 3) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def boxes(count: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(count, 2, 2, generator=g).sort(dim=1).values.flatten(1)


def given(count: int, length: int = 5, seed: int = 0) -> tuple[Tensor, ...]:
    """Boxes, points, validity, text and its mask, as `decode` takes them."""
    g = torch.Generator().manual_seed(seed + 100)
    text, points = torch.randn(count, length, TEXT, generator=g), torch.rand(count, 2, generator=g)
    mask = torch.arange(length) < torch.randint(1, length + 1, (count, 1), generator=g)
    return boxes(count, seed), points, torch.ones(count), text, mask


@torch.no_grad()
def public_masks(
    model: Any, image: Tensor, given_boxes: Tensor, points: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [B, K, h, w] and scores [B, K] of transformers' model for boxes [B, K, 4] in 0..1."""
    extra = {}
    if points is not None:
        extra["input_points"] = (points * SIDE).unsqueeze(2)
        extra["input_labels"] = torch.ones(points.shape[:2], dtype=torch.long).unsqueeze(2)
    answer = model(pixel_values=image, input_boxes=given_boxes * SIDE, multimask_output=False, **extra)
    return answer.pred_masks[:, :, 0], answer.iou_scores[:, :, 0].clamp(0, 1)


@pytest.mark.parametrize("side", [SIDE, 96])
def test_tiny_vit_equals_a_plain_reference(side: int) -> None:
    sizes = factory.TINY_VIT
    config = factory.mobile_sam_config(image_size=side)
    state = factory.official_tiny_vit(sizes, config.dim, seed=side)
    model = SamSegmenter(config).image_encoder
    converted = from_official(state)
    model.load_state_dict({k.removeprefix("image_encoder."): v for k, v in converted.items()})
    image = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side))
    with torch.no_grad():
        found = model.eval()(image).image_features
    torch.testing.assert_close(found, tiny_vit_by_hand(state, sizes, image), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("images", "count"), [(1, 1), (1, 7), (3, 2)])
def test_boxes_give_the_masks_of_transformers(
    public: dict[str, Any], segmenters: dict[str, SamSegmenter], family: str, images: int, count: int
) -> None:
    image, model = pixels(images), segmenters[family]
    wanted, scores = public_masks(public[family], image, boxes(images * count).unflatten(0, (images, count)))
    with torch.no_grad():
        parts = (part.unflatten(0, (images, count)) for part in given(images * count))
        found, found_scores = model(image, Prompts(*parts))
    scale = float(wanted.abs().max())
    assert scale > 0.1
    torch.testing.assert_close(found, wanted, atol=2e-5 * scale, rtol=1e-4)
    torch.testing.assert_close(found_scores, scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_points_beside_boxes_where_configured(
    public: dict[str, Any], folders: dict[str, Path], family: str
) -> None:
    model = load_transformers(folders[family], replace(PATH, points=True))
    prompts = given(4)
    wanted, _ = public_masks(public[family], pixels(), prompts[0][None], prompts[1][None])
    with torch.no_grad():
        found, _ = model.decode(model.encode(pixels()), *prompts)
    torch.testing.assert_close(found, wanted[0], atol=2e-5 * float(wanted.abs().max()), rtol=1e-4)


def test_sam2_takes_another_mask_where_the_first_is_unstable(
    public: dict[str, Any], segmenters: dict[str, SamSegmenter]
) -> None:
    # Random masks are hardly ever stable: the branch for unstable ones is tested above, this one here.
    model = segmenters["sam2"]
    decoder = public["sam2"].mask_decoder
    before = decoder.dynamic_multimask_stability_thresh, model.mask_decoder.stability
    answers = []
    try:
        for threshold in (0.0, 0.9, 1.0):
            decoder.dynamic_multimask_stability_thresh = threshold
            model.mask_decoder.stability = (0.05, threshold)
            wanted, scores = public_masks(public["sam2"], pixels(), boxes(12)[None])
            with torch.no_grad():
                found, found_scores = model.decode(model.encode(pixels()), *given(12))
            torch.testing.assert_close(found, wanted[0], atol=2e-5 * float(wanted.abs().max()), rtol=1e-4)
            torch.testing.assert_close(found_scores, scores[0], atol=1e-4, rtol=0)
            answers.append(found)
    finally:
        decoder.dynamic_multimask_stability_thresh, model.mask_decoder.stability = before
    assert not torch.equal(answers[0], answers[-1])


def test_official_names_give_the_same_decoder(public: dict[str, Any], mobile_sam: SamSegmenter) -> None:
    model, g = public["sam"], torch.Generator().manual_seed(9)
    features = torch.randn(1, mobile_sam.config.dim, SIDE // 16, SIDE // 16, generator=g)
    prompts = given(6)
    with torch.no_grad():
        answer = model(image_embeddings=features, input_boxes=prompts[0][None] * SIDE, multimask_output=False)
        found, scores = mobile_sam.decode(PlainFeatures(features), *prompts)
    wanted = answer.pred_masks[0, :, 0]
    torch.testing.assert_close(found, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=1e-4)
    torch.testing.assert_close(scores, answer.iou_scores[0, :, 0].clamp(0, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["sam", "sam2", "mobile_sam"])
@torch.no_grad()
def test_text_changes_nothing_until_trained(segmenters: dict[str, SamSegmenter], family: str) -> None:
    model = segmenters[family]
    features = model.encode(pixels())
    box, point, valid, text, mask = given(5)
    plain, scores = model.decode(features, box, point, valid, text, torch.zeros_like(mask))
    read, read_scores = model.decode(features, box, point, valid, 30.0 * text, mask)
    assert torch.equal(plain, read) and torch.equal(scores, read_scores)
    out = model.mask_decoder.semantic.attention.out
    out.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    try:
        changed, _ = model.decode(features, box, point, valid, text, mask)
        other, _ = model.decode(features, box, point, valid, text.flip(0), mask)
    finally:
        out.weight.zero_()
    assert not torch.allclose(changed, plain, atol=1e-3) and not torch.allclose(changed, other, atol=1e-3)


@pytest.mark.parametrize("family", ["sam", "mobile_sam"])
def test_the_text_path_can_be_trained_from_zero(segmenters: dict[str, SamSegmenter], family: str) -> None:
    model = segmenters[family]
    with torch.no_grad():
        features = model.encode(pixels())
    logits, _ = model.decode(features, *given(2))
    logits.square().mean().backward()
    gradient = model.mask_decoder.semantic.attention.out.weight.grad
    assert gradient is not None and float(gradient.abs().max()) > 0
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_without_a_place_box_and_point_do_not_count(segmenters: dict[str, SamSegmenter]) -> None:
    model = segmenters["mobile_sam"]
    features = model.encode(pixels())
    box, point, valid, text, mask = given(3)
    valid = torch.tensor([1.0, 0.0, 1.0])
    base, _ = model.decode(features, box, point, valid, text, mask)
    moved, _ = model.decode(features, 1 - box.flip(1), 1 - point, valid, text, mask)
    assert torch.equal(base[1], moved[1]) and not torch.allclose(base[0], moved[0])


@torch.no_grad()
def test_a_prompt_is_not_changed_by_those_beside_it(segmenters: dict[str, SamSegmenter]) -> None:
    for model in segmenters.values():
        features, prompts = model.encode(pixels()), given(6)
        together, _ = model.decode(features, *prompts)
        for i in range(6):
            alone, _ = model.decode(features, *(part[i : i + 1] for part in prompts))
            torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["sam", "sam2", "mobile_sam"])
@torch.no_grad()
def test_saved_and_loaded(segmenters: dict[str, SamSegmenter], tmp_path: Path, family: str) -> None:
    model = segmenters[family]
    model.save(tmp_path)
    again = load_segmenter(tmp_path)
    assert isinstance(again, SamSegmenter) and again.config == SamConfig.from_json(
        (tmp_path / "config.json").read_text()
    )
    found, _ = again.decode(again.encode(pixels()), *given(2))
    wanted, _ = model.decode(model.encode(pixels()), *given(2))
    assert torch.equal(found, wanted)


def test_shards_are_read_and_a_missing_one_is_named(public: dict[str, Any], tmp_path: Path) -> None:
    folder = factory.save_public(public["sam"], tmp_path / "sam", shards=3)
    whole = load_transformers(folder, PATH)
    wanted = public["sam"].state_dict()["vision_encoder.patch_embed.projection.weight"]
    assert torch.equal(whole.state_dict()["image_encoder.model.patch_embed.projection.weight"], wanted)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00003.safetensors is missing"):
        load_transformers(folder, PATH)


def test_video_models_hold_the_image_model(public: dict[str, Any], tmp_path: Path) -> None:
    folder = factory.save_public(public["sam2"], tmp_path / "video")
    values = json.loads((folder / "config.json").read_text())
    values.update(model_type="sam2_video", memory_attention_num_layers=4)
    (folder / "config.json").write_text(json.dumps(values))
    assert load_transformers(folder, PATH).config.architecture == "sam2"


@pytest.mark.parametrize("family", FAMILIES)
def test_configurations_of_other_versions_are_read(
    folders: dict[str, Path], segmenters: dict[str, SamSegmenter], tmp_path: Path, family: str
) -> None:
    # transformers 4 writes what every configuration once held, and leaves out what it holds by default.
    values = json.loads((folders[family] / "config.json").read_text())
    old = {"torch_dtype": "float32", "transformers_version": "4.29.0.dev0", "architectures": ["SamModel"]}
    values.update(old)
    values.pop("dtype", None)
    for part in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
        values[part] |= {"chunk_size_feed_forward": 0, "is_decoder": False, "num_beams": 1, **old}
        values[part].pop("initializer_range", None)
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").symlink_to(folders[family] / "model.safetensors")
    found = load_transformers(tmp_path, PATH)
    assert found.config == segmenters[family].config


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "clip"}, "holds a 'clip', which is no segmenter known here"),
        ({"model_type": None}, "holds a None"),
        ({"mask_decoder_config": {"hidden_act": "gelu"}}, "not supported: mask decoder with gelu"),
        ({"vision_config": {"hidden_size": 64}}, "has shape"),
        ({"vision_config": {"num_hidden_layers": 4}}, "lacks image_encoder.model.layers.3"),
        ({"vision_config": {"num_hidden_layers": 2}}, "has image_encoder.model.layers.2"),
        ({"vision_config": {"hidden_size": "wide"}}, "cannot read this segmenter's config.json"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_line(
    folders: dict[str, Path], tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    values = json.loads((folders["sam"] / "config.json").read_text())
    for name, value in change.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").symlink_to(folders["sam"] / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_transformers(tmp_path, PATH)
    assert told in str(error.value) and "\n" not in str(error.value)


class Payload:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "executed")


def test_a_pickle_that_is_more_than_tensors_is_never_executed(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"weight": torch.zeros(2), "more": Payload(trap)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"more": Payload(trap)}))
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "nested.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    (tmp_path / "noise.pt").write_bytes(b"\x93NUMPY not a pickle")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("zip.pt", "plain.pt", "nested.pt", "list.pt", "noise.pt", "empty.pt", "absent.pt"):
        with pytest.raises(CheckpointError) as error:
            read_state_dict(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not trap.exists()
    torch.save({"weight": torch.arange(3.0)}, tmp_path / "good.pt")
    assert read_state_dict(tmp_path / "good.pt")["weight"].tolist() == [0.0, 1.0, 2.0]


def test_another_models_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="does not hold the weights of a mobile_sam"):
        load_mobile_sam(tmp_path / "other.pt", PATH)


def test_official_weights_fit(weights: Path) -> None:
    model = load_mobile_sam(weights / "mobile_sam.pt", TextPath(text_dim=32))
    state = read_state_dict(weights / "mobile_sam.pt")
    queries = torch.cat([state["mask_decoder.iou_token.weight"], state["mask_decoder.mask_tokens.weight"]])
    assert torch.equal(model.mask_decoder.queries, queries)
    bias = state["image_encoder.layers.3.blocks.1.attn.attention_biases"]
    assert torch.equal(model.state_dict()["image_encoder.model.stages.2.1.attention.bias"], bias)
