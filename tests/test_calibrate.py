"""The threshold of "none": the shift that is asked for, and a model that is moved by it."""

from __future__ import annotations

import pytest
import torch

from ppcr.model.checkpoint import load_mllm
from ppcr.tokenizer import PromptTokenizer
from ppcr.training.calibrate import calibrate, shift_for
from tests import factory


def test_shift_gives_the_share_asked_for() -> None:
    margins = torch.randn(5000) - 3
    counts = torch.randint(0, 4, (5000,))
    moved = margins + shift_for(margins, counts, 0.02)
    assert float((moved[counts > 0] > 0).float().mean()) == pytest.approx(0.02, abs=1e-3)


def test_only_the_row_of_none_moves_and_the_share_is_met() -> None:
    folder = factory.random_checkpoint() / "mllm"
    model, tokenizer = load_mllm(folder), PromptTokenizer.load(folder / "tokenizer.json")
    table = model.model.language_model.embed_tokens.weight
    before = table.detach().clone()
    found = calibrate(model, tokenizer, false_none=0.1, scenes=16)
    assert found["after_false"] == pytest.approx(0.1, abs=0.03)
    moved = torch.nonzero((table != before).any(1))[:, 0].tolist()
    assert moved == [tokenizer.count_tokens[0]]
