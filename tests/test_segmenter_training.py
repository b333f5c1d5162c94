"""The segmenter's training: prompts, scenes and losses; that it learns, and resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ppcr.data.graph import sample_scene
from ppcr.errors import UsageError
from ppcr.model.segmenter import Segmenter
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
from tests.small_segmenter import SMALL, pixels, prompts
from tests.small_segmenter import model as small_model


@pytest.fixture
def model() -> Segmenter:
    return small_model()


def encode(text: str) -> list[int]:
    return [sum(word.encode()) % 97 for word in text.split()]


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
    with pytest.raises(UsageError, match="use another --output"):
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
