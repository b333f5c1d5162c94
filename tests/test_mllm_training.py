"""The MLLM's training on a CPU: a stopped run goes on, the result is a stock checkpoint."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from ppcr.data.expressions import sample_expressions
from ppcr.data.graph import COLORS, HELD_OUT_PAIRS, SHAPES, sample_scene
from ppcr.data.render import ALBEDO, render
from ppcr.data.repaint import repaint
from ppcr.images import normalise, patchify
from ppcr.model.checkpoint import load_mllm
from ppcr.model.mllm import TinyMLLM
from ppcr.training import mllm as training
from ppcr.training.common import Budget, LossLog, load_resume
from ppcr.training.grounding_loss import ObjectHead, PointingHead, location_targets
from ppcr.training.mllm_data import IMAGE_MEAN, IMAGE_STD, NO_NAME, Conversations, draw
from ppcr.training.mllm_data import patchify as torch_patchify
from ppcr.training.packing import Packer

RECIPE = training.Recipe(minutes=0.08, batch=2, look_until=0.2, level_1_at=0.4, level_2_at=0.6)


class Ticking(Budget):
    """Each look at the clock finds an eighth of a second gone: a run has the same steps on any machine."""

    _looks = 0

    @property
    def elapsed_s(self) -> float:
        self._looks += 1
        return self.spent_s + self._looks / 8


def test_a_run_writes_a_checkpoint_and_a_resumed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = training.corpus(200)
    monkeypatch.setattr(training, "corpus", lambda: few)
    monkeypatch.setattr(training, "Budget", Ticking)
    device = torch.device("cpu")
    folder = training.train(RECIPE, tmp_path, device=device, workers=0)
    first = load_resume(tmp_path / "resume.pt")
    assert first is not None and first["step"] >= 1
    assert load_mllm(folder).config.model_type == "qwen2_5_vl"
    longer = dataclasses.replace(RECIPE, minutes=float(first["spent_s"]) / 60 + 0.1)
    training.train(longer, tmp_path, device=device, workers=0)
    second = load_resume(tmp_path / "resume.pt")
    assert second is not None and second["step"] > first["step"] and second["spent_s"] > first["spent_s"]
    name = "model.model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first["trainer"][name], second["trainer"][name])


def test_patches_equal_the_runtime_preprocessing() -> None:
    image = (torch.rand(2, 3, 64, 64) * 255).round()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    ours = torch_patchify((image / 255 - mean) / std, 8, 2)
    for one, expected in zip(image, ours, strict=True):
        pixels = one.permute(1, 2, 0).numpy().astype(np.uint8)
        patches = patchify(normalise(pixels, IMAGE_MEAN, IMAGE_STD), 8, 2, 2)
        np.testing.assert_allclose(patches, expected.numpy(), atol=1e-5)


def test_a_step_depends_on_the_seed_alone() -> None:
    level, looking = multiprocessing.Value("i", 2), multiprocessing.Value("b", True)
    size = TinyMLLM()

    def batch(start: int):  # type: ignore[no-untyped-def]
        view = (128, 8, 2, "cpu")
        data = Conversations(
            packer, batch=2, seed=3, start=start, level=level, looking=looking, render_here=view
        )
        return data.make(start)

    tokenizer = training.PromptTokenizer(training.train_tokenizer(training.corpus(100)))
    packer = Packer(tokenizer, grid=size.grid, objects=14)
    one, two, other = batch(4), batch(4), batch(5)
    assert torch.equal(one["ids"], two["ids"]) and torch.equal(one["scenes"].patches, two["scenes"].patches)
    assert torch.equal(one["repainted"].patches, two["repainted"].patches)
    assert not torch.equal(one["ids"], other["ids"])
    looking.value = False
    assert "repainted" not in batch(4)


def test_object_head_is_right_when_told_the_answer_and_gradients_reach_features() -> None:
    graphs = [sample_scene("crowded", 4), sample_scene("train", 9)]
    scenes = draw(graphs, 64, 8, 2, "cpu")
    head = ObjectHead(16, 8)
    features = torch.randn(2, 64, 16, requires_grad=True)
    terms = head(features, scenes.boxes, scenes.points, scenes.classes, scenes.present)
    terms["look"].backward()
    assert features.grad is not None and features.grad.abs().sum() > 0
    assert 0 <= float(terms["found"]) <= 1


def test_object_head_asks_no_colour_of_repainted_objects_and_denies_no_pair_it_never_sees() -> None:
    graph = sample_scene("train", 9)
    scenes = draw([graph], 64, 8, 2, "cpu", [repaint(graph, np.random.default_rng(1))])
    assert (scenes.classes[..., 1] == NO_NAME).all() and (scenes.classes[..., 0] >= 0).all()
    head = ObjectHead(16, 8)
    features = torch.randn(1, 64, 16)
    terms = head(features, scenes.boxes, scenes.points, scenes.classes, scenes.present)
    assert torch.isfinite(terms["look"])
    red, cylinder, cube = COLORS.index("red"), SHAPES.index("cylinder"), SHAPES.index("cube")
    asked = torch.zeros(2, len(SHAPES), requires_grad=True)
    adjusted = head._adjusted(asked, torch.tensor([red, NO_NAME]))
    torch.nn.functional.cross_entropy(adjusted, torch.tensor([cube, cube])).backward()
    assert asked.grad is not None
    assert asked.grad[0, cylinder] == 0 and asked.grad[1, cylinder] > 0


@pytest.mark.parametrize("seed", range(5))
def test_repainted_objects_never_pass_for_an_unseen_pair(seed: int) -> None:
    rng = np.random.default_rng(seed)
    graph = sample_scene("train", int(rng.integers(1 << 30)))
    paint = repaint(graph, rng)
    assert paint.shape == (len(graph), 3) and paint.dtype == np.float32
    gaps = np.linalg.norm(paint[:, None] - np.array(ALBEDO, np.float32), axis=-1)
    for shape, nearest in zip(graph.shape, gaps.argmin(-1), strict=True):
        assert (COLORS[nearest], SHAPES[shape]) not in HELD_OUT_PAIRS
    named, painted = render([graph], 64), render([graph], 64, albedo=[paint])
    assert torch.equal(named.masks, painted.masks) and not torch.equal(named.image, painted.image)


def test_conversations_with_several_targets_get_the_long_slots() -> None:
    tokenizer = training.PromptTokenizer(training.train_tokenizer(training.corpus(100)))
    packer = Packer(tokenizer, grid=8, objects=14, slots=((4, 40), (2, 72)))
    for seed in range(20):
        graph = sample_scene("train", seed)
        expressions = sample_expressions(graph, 6, np.random.default_rng(seed), 2)
        several = sum(len(e.targets) > 1 for e in expressions)
        lengths = [packer._tokens(e).first_stage for e in expressions]
        if max(lengths) > 40:
            continue  # these come first
        packed = packer.pack(graph, expressions)
        boxes = (packed.label_reference >= 0).reshape(-1)
        first_long = packer.layout.places[4][0]
        assert not boxes[:first_long].any()
        counts = [int(boxes[at : at + length].sum()) // 6 for at, length in packer.layout.places[4:]]
        assert sum(count > 1 for count in counts) == min(several, 2)


def test_pointing_prefers_the_wanted_cell_and_the_nothing_choice() -> None:
    head = PointingHead(8, 4, channels=8)
    image = torch.randn(1, 16, 8)
    centres = torch.tensor([[[0.9, 0.1], [0.1, 0.9]]])
    with torch.no_grad():
        for query, key in zip(head.query, head.key, strict=True):
            for layer in (query, key):
                assert isinstance(layer, torch.nn.Linear)
                layer.weight.copy_(torch.eye(8) if layer is key else torch.zeros(8, 8))
                layer.bias.zero_()
    answers, images = [torch.zeros(1, 2, 8)] * 3, [image] * 3
    rows = torch.tensor([[False, True]])
    wanted = torch.tensor([[[True, False], [False, False], [True, True]]])
    flat = head(answers, images, rows, centres, wanted)["point"]
    # All logits are equal: each of the three questions costs the entropy of 16 cells and nothing.
    assert float(flat.detach()) == pytest.approx(np.log(17), rel=1e-5)
    with torch.no_grad():
        first = head.query[0]
        assert isinstance(first, torch.nn.Linear)
        first.bias.copy_(20 * image[0, 3])  # cell of (0.9, 0.1): column 3 of row 0
    after = head(answers, images, rows, centres, wanted)
    assert float(after["point"].detach()) < float(flat.detach()) and float(after["pointed"]) == 1.0


def test_location_targets_peak_at_the_value() -> None:
    soft = location_targets(torch.tensor([0.25, 0.9995]), 4.0)
    assert soft.argmax(-1).tolist() in ([249, 999], [250, 999])
    assert soft.sum(-1).tolist() == pytest.approx([1.0, 1.0])


def test_loss_log_survives_a_half_written_line(tmp_path: Path) -> None:
    log = LossLog(tmp_path / "loss.jsonl")
    log.append(1, word=0.5)
    with (tmp_path / "loss.jsonl").open("a") as stream:
        stream.write('{"step": 2, "wo')
    assert log.rows() == [{"step": 1, "word": 0.5}]
