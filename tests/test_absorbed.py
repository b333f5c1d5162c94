"""The mask decoder's form for a CPU: answers as the plain one's, without projecting cells for each prompt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from export.absorbed import AbsorbedAttention, FlatLinear, absorbed
from kernels.reference import DIRECTIONS, IMAGE_TO_PROMPT
from ppcr.model.mask_decoder import PromptFeatureAttention
from ppcr.model.prompt_encoder import Prompts
from ppcr.model.sam import SamSegmenter
from tests import sam_factory as factory

DIM, HEADS, HEAD_DIM = 24, 3, 5


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("prompts", "tokens", "cells"), [(1, 1, 1), (3, 7, 50), (2, 4, 33)])
@torch.no_grad()
def test_answers_equal_the_plain_attention(
    direction: str, shared: bool, prompts: int, tokens: int, cells: int
) -> None:
    plain = PromptFeatureAttention(DIM, HEADS, HEAD_DIM, direction)
    factory.shake(plain)
    norm = nn.LayerNorm(DIM)
    factory.shake(norm)
    words, image = torch.randn(2, prompts, tokens, DIM), torch.randn(2, 1 if shared else prompts, cells, DIM)
    places = torch.randn(2, prompts, tokens, DIM), torch.randn(cells, DIM)
    given: tuple[Tensor, ...] = (words, places[0], image, places[1])
    after = None
    if direction == IMAGE_TO_PROMPT:
        given, after = (*given[2:], *given[:2]), torch.randn(2, prompts, cells, DIM)
    wanted = plain(*given, norm, after)
    found = AbsorbedAttention(plain)(*given, norm, after)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_flat_products_equal_the_layer() -> None:
    plain, x = nn.Linear(7, 5), torch.randn(2, 3, 1, 7)
    torch.testing.assert_close(FlatLinear(plain)(x), plain(x))


@torch.no_grad()
def test_a_segmenter_is_left_as_it_was_and_lends_its_weights() -> None:
    model = SamSegmenter(factory.mobile_sam_config(points=True)).eval()
    factory.shake(model)
    made = absorbed(model)
    assert not any(isinstance(module, AbsorbedAttention) for module in model.modules())
    replaced = [module for module in made.modules() if isinstance(module, AbsorbedAttention)]
    assert len(replaced) == 2 * model.config.layers + 1
    assert {p.data_ptr() for p in made.parameters()} == {p.data_ptr() for p in model.parameters()}
    count, text = 5, torch.randn(1, 5, 3, factory.TEXT)
    corners = torch.rand(1, count, 2, 2).sort(dim=2).values.flatten(2)
    valid, mask = torch.tensor([[1.0, 0, 1, 1, 0]]), torch.rand(1, count, 3) > 0.5
    prompts = Prompts(corners, torch.rand(1, count, 2), valid, text, mask)
    features = model.encode(torch.randn(1, 3, factory.SIDE, factory.SIDE))
    wanted, found = model.decode_batch(features, prompts), made.decode_batch(features, prompts)
    scale = float(wanted[0].abs().max())
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5 * scale, rtol=1e-4)
    torch.testing.assert_close(found[1], wanted[1], atol=1e-5, rtol=1e-4)
