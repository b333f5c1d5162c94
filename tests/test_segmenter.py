"""The segmenter: shapes, meaning of prompts, batching, files, export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ppcr.model import segmenter_files
from ppcr.model.mask_decoder import CellFeatures, PromptFeatureAttention
from ppcr.model.prompt_encoder import Prompts
from ppcr.model.segmenter import Segmenter
from ppcr.model.segmenters import load_segmenter
from tests.small_segmenter import SMALL, pixels, prompts
from tests.small_segmenter import model as small_model


@pytest.fixture
def model() -> Segmenter:
    return small_model()


@torch.no_grad()
def test_contract_shapes(model: Segmenter) -> None:
    features = model.encode(pixels())
    assert [tuple(f.shape) for f in features] == [(1, 1, 64, 32), (1, 1, 64, 4, 16), (1, 1, 64, 4, 4, 8)]
    masks, scores = model.decode(features, *prompts(3))
    assert masks.shape == (3, 32, 32) and scores.shape == (3,)
    assert bool(((scores >= 0) & (scores <= 1)).all()) and bool(masks.isfinite().all())


@torch.no_grad()
def test_default_size_matches_contract() -> None:
    full = Segmenter().eval()
    assert 1.5e6 < sum(p.numel() for p in full.parameters()) < 3e6
    features = full.encode(torch.zeros(1, 3, 256, 256))
    shapes = [(1, 1, 1024, 128), (1, 1, 1024, 4, 32), (1, 1, 1024, 4, 4, 16)]
    assert [tuple(f.shape) for f in features] == shapes
    masks, scores = full.decode(features, *prompts(2))
    assert masks.shape == (2, 128, 128) and scores.shape == (2,)
    directions = {
        n.rsplit(".", 1)[-1] for n, m in full.named_modules() if isinstance(m, PromptFeatureAttention)
    }
    assert directions == {"prompt_to_image", "image_to_prompt", "last_prompt_to_image"}


@torch.no_grad()
def test_prompts_of_one_image_are_independent(model: Segmenter) -> None:
    features = model.encode(pixels())
    given = prompts(4)
    together, scores = model.decode(features, *given)
    for i in range(4):
        alone, score = model.decode(features, *(t[i : i + 1] for t in given))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(score[0], scores[i], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_batched_training_form_equals_the_exported_form(model: Segmenter) -> None:
    image = pixels(2)
    first, second = prompts(3, seed=1), prompts(3, seed=2)
    both = Prompts(*(torch.stack(pair) for pair in zip(first, second, strict=True)))
    masks, scores = model(image, both)
    for b, given in enumerate((first, second)):
        alone, score = model.decode(model.encode(image[b : b + 1]), *given)
        torch.testing.assert_close(masks[b], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(scores[b], score, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_not_valid_is_not_read(model: Segmenter) -> None:
    features = model.encode(pixels())
    boxes, points, valid, text, mask = prompts(2)
    base, _ = model.decode(features, boxes, points, valid, text, mask)
    padded = torch.where(mask[..., None], text, torch.full_like(text, 7.0) * torch.arange(text.shape[-1]))
    longer = torch.cat([padded, torch.randn(2, 4, SMALL.text_dim)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(model.decode(features, boxes, points, valid, longer, longer_mask)[0], base)

    none = torch.zeros_like(mask)
    no_text, _ = model.decode(features, boxes, points, valid, text, none)
    assert not torch.allclose(no_text, base, atol=1e-3)
    torch.testing.assert_close(model.decode(features, boxes, points, valid, -3.0 * text, none)[0], no_text)

    blind = torch.zeros_like(valid)
    no_box, _ = model.decode(features, boxes, points, blind, text, mask)
    assert not torch.allclose(no_box, base, atol=1e-3)
    torch.testing.assert_close(
        model.decode(features, 1 - boxes.flip(1), points * 0, blind, text, mask)[0], no_box
    )


@torch.no_grad()
def test_scale_of_the_embedding_does_not_matter(model: Segmenter) -> None:
    features = model.encode(pixels())
    boxes, points, valid, text, mask = prompts(2)
    small, _ = model.decode(features, boxes, points, valid, 0.05 * text, mask)
    large, _ = model.decode(features, boxes, points, valid, 20.0 * text, mask)
    torch.testing.assert_close(small, large, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_degenerate_boxes_give_finite_masks(model: Segmenter) -> None:
    features = model.encode(pixels())
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 1.0, 1.0], [-0.5, -0.5, 2.0, 2.0]])
    _, points, valid, text, mask = prompts(3)
    masks, scores = model.decode(features, boxes, points, valid, text, mask)
    assert bool(masks.isfinite().all()) and bool(scores.isfinite().all())


@torch.no_grad()
def test_mask_pixels_are_where_their_image_pixels_are() -> None:
    """A high-resolution feature that is lit in one pixel reaches that pixel of the mask and no other."""
    torch.manual_seed(1)
    model = Segmenter(SMALL).eval()
    features = model.encode(pixels())
    given = prompts(1)
    base, _ = model.decode(features, *given)
    for y, x in ((0, 0), (5, 18), (31, 2), (14, 31)):
        cell, quarter, pixel = y // 4 * 8 + x // 4, y % 4 // 2 * 2 + x % 4 // 2, y % 2 * 2 + x % 2
        lit = features.high_res_1.clone()
        lit[:, :, cell, quarter, pixel] += 5.0
        changed = (model.decode(features._replace(high_res_1=lit), *given)[0] - base).abs()[0] > 1e-6
        assert changed.nonzero().tolist() == [[y, x]]


def test_save_and_load(tmp_path: Path, model: Segmenter) -> None:
    given = prompts(2)
    for half, tolerance in ((False, 0.0), (True, 0.05)):
        model.save(tmp_path / str(half), half=half)
        again = Segmenter.load(tmp_path / str(half))
        assert again.config == SMALL and not again.training
        with torch.no_grad():
            expected = model.decode(model.encode(pixels()), *given)[0]
            got = again.decode(again.encode(pixels()), *given)[0]
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert sorted(p.name for p in (tmp_path / "True").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"architecture": "sam"}, "architecture 'sam'"), ({"depth": 3}, "depth"), ({"dim": 64}, "does not fit")],
)
def test_foreign_segmenter_is_refused(
    tmp_path: Path, model: Segmenter, change: dict[str, object], message: str
) -> None:
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        Segmenter.load(tmp_path)


def test_decoder_exports_with_any_number_of_prompts_and_tokens(tmp_path: Path, model: Segmenter) -> None:
    import onnxruntime

    class Decode(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, f, h0, h1, boxes, points, valid, text, mask):  # type: ignore[no-untyped-def]
            return self.model.decode(CellFeatures(f, h0, h1), boxes, points, valid, text, mask)

    with torch.no_grad():
        features = model.encode(pixels())
    n, t = torch.export.Dim("n"), torch.export.Dim("t", max=SMALL.max_text)
    shapes = (None, None, None, {0: n}, {0: n}, {0: n}, {0: n, 1: t}, {0: n, 1: t})
    names = ["f", "h0", "h1", "boxes", "points", "valid", "text", "mask"]
    path = tmp_path / "decoder.onnx"
    torch.onnx.export(
        Decode().eval(),
        (*features, *prompts(3, 6)),
        str(path),
        input_names=names,
        dynamo=True,
        opset_version=20,
        dynamic_shapes=shapes,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count, length in ((1, 1), (5, 17)):
        given = prompts(count, length, seed=count)
        with torch.no_grad():
            masks, scores = model.decode(features, *given)
        feed = dict(zip(names, (x.numpy() for x in (*features, *given)), strict=True))
        got_masks, got_scores = session.run(None, feed)
        np.testing.assert_allclose(got_masks, masks.numpy(), atol=1e-3)
        np.testing.assert_allclose(got_scores, scores.numpy(), atol=1e-4)


@pytest.mark.parametrize("damage", ["missing", "cut_short", "list"])
def test_damaged_files_are_refused(tmp_path: Path, model: Segmenter, damage: str) -> None:
    model.save(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "cut_short":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        (tmp_path / "config.json").write_text("[]")
    with pytest.raises((FileNotFoundError, ValueError), match="model.safetensors|not a JSON object"):
        load_segmenter(tmp_path)


def test_a_save_that_fails_leaves_the_old_files(
    tmp_path: Path, model: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(state: dict[str, torch.Tensor], path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(segmenter_files, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        Segmenter.load(tmp_path).save(tmp_path, half=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
