"""The segmenter: shapes, meaning of prompts, batching, files, export; training that learns and resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from ppcr.data.graph import sample_scene
from ppcr.model.mask_decoder import PromptFeatureAttention
from ppcr.model.prompt_encoder import Prompts
from ppcr.model.segmenter import Segmenter, SegmenterConfig
from ppcr.training.common import Ema, LossLog, cosine, load_resume, save_resume
from ppcr.training.segmenter import Recipe, Trainer
from ppcr.training.segmenter_data import (
    PromptMix,
    ScenePool,
    TextTable,
    build,
    choose,
    jitter,
    sample_sigma,
)
from ppcr.training.segmenter_loss import mask_iou, mask_loss
from ppcr.training.segmenter_text import rebase_text

SMALL = SegmenterConfig(
    image_size=64,
    dim=32,
    high_res=(16, 8),
    encoder_blocks=1,
    context_dim=32,
    context_blocks=1,
    text_layers=1,
    heads=2,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(SMALL).eval()


def prompts(n: int, t: int = 5, *, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    low, size = torch.rand(n, 2, generator=g) * 0.5, 0.1 + torch.rand(n, 2, generator=g) * 0.4
    boxes = torch.cat([low, low + size], dim=1)
    mask = torch.arange(t)[None] < torch.randint(1, t + 1, (n, 1), generator=g)
    return boxes, low + size / 2, torch.ones(n), torch.randn(n, t, SMALL.text_dim, generator=g), mask


def pixels(b: int = 1) -> torch.Tensor:
    return torch.randn(b, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def encode(text: str) -> list[int]:
    return [sum(word.encode()) % 97 for word in text.split()]


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


def test_jitter_keeps_corners_in_order_and_inside() -> None:
    rng = np.random.default_rng(0)
    boxes = np.tile(np.array([[0.02, 0.4, 0.12, 0.5]], np.float32), (500, 1))
    points = np.tile(np.array([[0.07, 0.45]], np.float32), (500, 1))
    exact, same = jitter(boxes, points, np.zeros(500, np.float32), rng)
    assert np.array_equal(exact, boxes) and np.array_equal(same, points)
    moved, placed = jitter(boxes, points, np.full(500, 0.08, np.float32), rng)
    assert (moved[:, :2] <= moved[:, 2:]).all() and moved.min() >= 0 and moved.max() <= 1
    assert placed.min() >= 0 and 0.05 < placed[:, 1].std() < 0.12


def test_prompts_are_drawn_as_the_mix_says() -> None:
    mix, rng = PromptMix(), np.random.default_rng(0)
    graphs = [sample_scene("train", i) for i in range(150)]
    drawn = [(len(g), c) for g in graphs for c in choose(g, 6, mix, rng)]
    assert len(drawn) == 900
    assert all(0 <= c.wanted < n and -1 <= c.boxed < n for n, c in drawn)
    share = sum(c.boxed < 0 for _, c in drawn) / len(drawn)
    assert 0.15 < share < 0.30
    assert all(c.unique and c.text for _, c in drawn if c.boxed != c.wanted)
    named = [c for _, c in drawn if c.text]
    assert all(c.candidates >> c.wanted & 1 for c in named) and any(c.anchors for c in named)
    assert all(c.anchors < 1 << n for n, c in drawn)
    sigma = sample_sigma((100, 50), mix, rng)
    assert sigma.shape == (100, 50) and sigma.min() >= 0 and sigma.max() <= 0.08


def test_pool_gives_each_prompt_its_own_object() -> None:
    pool = ScenePool(5, size=64)
    pool.add(8)
    assert len(pool) == 5 and pool.next_seed == 8
    rng = np.random.default_rng(0)
    rows = np.array([0, 2, 4])
    choices = [choose(pool.graphs[r], 4, PromptMix(drop_spatial=0.0, wrong_box=0.0), rng) for r in rows]
    given, targets = build(
        pool, rows, choices, np.zeros((3, 4), np.float32), TextTable(torch.randn(97, 8), encode), rng
    )
    masks = targets.masks()
    x, y = (given.points * 64).long().unbind(-1)
    for b in range(3):
        for k in range(4):
            assert masks[b, k, y[b, k], x[b, k]]
            rows_on = masks[b, k].any(1).nonzero().flatten()
            assert given.boxes[b, k, 1] * 64 == rows_on[0] and given.boxes[b, k, 3] * 64 == rows_on[-1] + 1
    assert given.text_mask.any(-1).tolist() == [[bool(c.text) for c in row] for row in choices]


def test_losses_are_least_at_the_truth() -> None:
    truth = torch.zeros(1, 1, 16, 16)
    truth[..., 4:9, 3:8] = 1.0
    truth[..., 4, 3:8] = 0.5
    right = torch.logit(truth.clamp(1e-4, 1 - 1e-4))
    good = sum(float(v) for v in mask_loss(right, truth))
    for other in (right.roll(1, -1), right + 2.0, right - 2.0, -right, torch.zeros_like(right)):
        assert sum(float(v) for v in mask_loss(other, truth)) > good + 0.01
    assert float(mask_iou(truth > 0.5, truth > 0.5)) == 1.0
    assert float(mask_iou(torch.zeros(4, 4).bool(), torch.zeros(4, 4).bool())) == 1.0


def recipe(**changes: Any) -> Recipe:
    base = Recipe(
        minutes=0.15, batch=4, prompts=3, pool=16, reuse=4.0, evaluate_minutes=9.0, save_minutes=9.0
    )
    return replace(base, **changes)


def trainer(output: Path, chosen: Recipe, **options: Any) -> Trainer:
    embedding = torch.randn(97, SMALL.text_dim, generator=torch.Generator().manual_seed(0))
    device = torch.device("cpu")
    return Trainer(chosen, output, embedding=embedding, encode=encode, device=device, config=SMALL, **options)


def test_training_learns(tmp_path: Path) -> None:
    """Fixed steps on a few scenes: a count of steps, not of seconds, so that a slow machine passes too."""
    learner = trainer(tmp_path, recipe(lr=4e-3))
    learner.mix = PromptMix(drop_spatial=0.0, wrong_box=0.0, jitter=((1.0, 0.0, 0.01),))
    learner.pool.add(4)
    learner.model.train()
    history = [{k: float(v) for k, v in learner.train_step().items()} for _ in range(120)]
    first, last = history[:10], history[-10:]
    for name in ("loss", "dice", "dense"):
        assert sum(h[name] for h in last) < 0.8 * sum(h[name] for h in first), name
    assert sum(h["iou"] for h in last) / 10 > 0.3


def test_training_saves_and_resumes(tmp_path: Path) -> None:
    first = trainer(tmp_path, recipe(minutes=0.05))
    first.run()
    assert (tmp_path / "loss.png").stat().st_size > 1000
    saved = Segmenter.load(tmp_path / "segmenter")
    assert torch.equal(saved.mask_decoder.queries, first.ema.shadow["mask_decoder.queries"])

    again = trainer(tmp_path, recipe(minutes=0.1))
    assert again.step == first.step and again.pool.next_seed == first.pool.next_seed
    assert again.budget.spent_s >= 3.0
    assert torch.equal(again.model.mask_decoder.queries, first.model.mask_decoder.queries)
    with pytest.raises(ValueError, match="use another --output"):
        trainer(tmp_path, recipe(train="text"))


def test_text_training_leaves_the_rest_alone(tmp_path: Path, model: Segmenter) -> None:
    model.save(tmp_path / "start")
    tuned = trainer(tmp_path / "run", recipe(train="text"), init=tmp_path / "start")
    tuned.pool.add(8)
    tuned.model.eval()
    tuned.train_step()
    for name, value in tuned.model.state_dict().items():
        same = torch.equal(value, model.state_dict()[name])
        assert same or name.startswith("prompt_encoder.text."), name
    assert not torch.equal(tuned.model.prompt_encoder.text.slots, model.prompt_encoder.text.slots)


@torch.no_grad()
def test_rebasing_to_another_embedding_keeps_the_masks(model: Segmenter, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(5)
    old, new = (
        torch.randn(60, SMALL.text_dim, generator=g),
        0.1 * torch.randn(80, SMALL.text_dim, generator=g),
    )
    model.save(tmp_path)
    moved = Segmenter.load(tmp_path)
    old_ids, new_ids = list(range(60)), list(range(79, 19, -1))
    rebase_text(moved, old[old_ids], new[new_ids])
    boxes, points, valid, _, mask = prompts(2)
    said = torch.tensor([[3, 50, 9, 11, 7], [59, 0, 22, 8, 8]])
    features = model.encode(pixels())
    before, _ = model.decode(features, boxes, points, valid, old[said], mask)
    after, _ = moved.decode(features, boxes, points, valid, new[torch.tensor(new_ids)[said]], mask)
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)


def test_shared_training_helpers(tmp_path: Path) -> None:
    assert cosine(0.0) < 0.1 and cosine(0.02) == pytest.approx(1.0) and cosine(1.0) == pytest.approx(0.02)
    layer = torch.nn.Linear(2, 2)
    ema = Ema(layer, decay=0.5)
    with torch.no_grad():
        layer.weight += 1.0
    trained = layer.weight.detach().clone()
    for _ in range(40):
        ema.update(layer)
    with ema.applied(layer):
        torch.testing.assert_close(layer.weight, trained, atol=1e-3, rtol=0)
        layer.weight.data.zero_()
    assert torch.equal(layer.weight, trained)

    save_resume(tmp_path / "r.pt", step=3, weights={"a": torch.ones(2)})
    save_resume(tmp_path / "r.pt", step=4, weights={"a": torch.ones(2)})
    state = load_resume(tmp_path / "r.pt")
    assert state is not None and state["step"] == 4 and [p.name for p in tmp_path.iterdir()] == ["r.pt"]
    assert load_resume(tmp_path / "missing.pt") is None

    log = LossLog(tmp_path / "l.jsonl")
    log.append(1, loss=0.5)
    with log.path.open("a") as stream:
        stream.write('{"step": 2, "lo')
    assert log.rows() == [{"step": 1, "loss": 0.5}]


def test_decoder_exports_with_any_number_of_prompts_and_tokens(tmp_path: Path, model: Segmenter) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Decode(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, f, h0, h1, boxes, points, valid, text, mask):  # type: ignore[no-untyped-def]
            from ppcr.model.mask_decoder import CellFeatures

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
