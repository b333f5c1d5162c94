"""Our vision tower in torch against the stock one: whole windows, cut ones, half precision, as a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from runtime.torch_graph import record
from runtime.torch_vision import TorchTower
from tests.families import Small, worst
from tests.test_torch_session import fake_cuda

# Cells (rows, columns) where windows are 4 by 4: whole, cut at both ends, one alone.
GRIDS = [(8, 4), (5, 6), (3, 2)]


@pytest.fixture(scope="module")
def visual() -> Any:
    return Small("qwen2_5_vl").build().model.visual


def stock(visual: Any, patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    with torch.no_grad():
        seen = visual(torch.from_numpy(patches), grid_thw=torch.tensor([[1, 2 * grid[0], 2 * grid[1]]]))
    found: np.ndarray = seen.pooler_output.numpy()
    return found


def noise(grid: tuple[int, int], seed: int) -> np.ndarray:
    shape = (4 * grid[0] * grid[1], 3 * 2 * 14**2)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("grid", GRIDS)
def test_features_are_those_of_the_stock_tower(visual: Any, grid: tuple[int, int]) -> None:
    patches = noise(grid, 3)
    with torch.no_grad():
        tower = TorchTower(visual, (2 * grid[0], 2 * grid[1]), graph=False)
        assert worst(tower.encode(patches).numpy(), stock(visual, patches, grid)) < 1e-5
    assert (tower._mask is None) == (grid != GRIDS[1])


def test_windows_do_not_see_each_other_and_whole_blocks_do(visual: Any) -> None:
    grid = GRIDS[0]
    patches = noise(grid, 4)
    other = patches.copy()
    other[-1] += 1  # in the second window
    with torch.no_grad():
        tower = TorchTower(visual, (2 * grid[0], 2 * grid[1]), graph=False)
        tower._whole = frozenset()
        apart = [tower.encode(given).numpy() for given in (patches, other)]
        tower._whole = frozenset(visual.config.fullatt_block_indexes)
        together = [tower.encode(given).numpy() for given in (patches, other)]
    np.testing.assert_array_equal(apart[0][:16], apart[1][:16])
    assert np.abs(together[0][:16] - together[1][:16]).max() > 0


def test_an_image_keeps_its_features_when_the_next_is_encoded(
    visual: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, told = GRIDS[1], list[str]()
    images = [noise(grid, seed) for seed in (5, 6)]
    with torch.no_grad():
        tower = TorchTower(visual, (2 * grid[0], 2 * grid[1]), graph=False)
        wanted = [tower.encode(image) for image in images]
        fake_cuda(monkeypatch, told)
        recorded = record(tower.run, "the vision tower")
        assert recorded is not None and told.count("capture") == 1
        recorded.graph.work, recorded.graph.result = tower.run, recorded.result  # type: ignore[attr-defined]
        tower._recorded = recorded
        got = [tower.encode(image) for image in images]
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_half_precision_turns_by_whole_angles() -> None:
    visual, grid = Small("qwen2_5_vl").build().model.visual, GRIDS[1]
    patches = noise(grid, 7)
    wanted = stock(visual, patches, grid)
    with torch.no_grad():
        tower = TorchTower(visual.to(torch.bfloat16), (2 * grid[0], 2 * grid[1]), graph=False)
        got = tower.encode(patches)
    assert got.dtype == torch.bfloat16 and tower._cos.dtype == torch.float32
    assert worst(got.float().numpy(), wanted) < 0.06
