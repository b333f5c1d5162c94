"""Where the tokens of conversations side by side stand in their cache: slots, masks and positions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.branches import Layout

parts = st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=4)


@given(st.integers(0, 5), st.lists(parts, min_size=1, max_size=5))
def test_every_token_sees_the_trunk_and_its_own_branch(trunk: int, calls: list[list[list[int]]]) -> None:
    count = max(map(len, calls))
    layout = Layout(count, trunk, 100)
    texts: list[list[int]] = [[] for _ in range(count)]
    stored: dict[int, tuple[int, int]] = {}  # slot -> token, position
    for call in calls:
        given_parts = {branch: part for branch, part in enumerate(call) if part}
        if not given_parts:
            continue
        block = layout.place(given_parts)
        stored.update(
            {block.start + i: (int(block.ids[i]), int(block.positions[i])) for i in range(len(block.ids))}
        )
        assert block.mask.shape == (len(block.ids), max(block.mask.shape[1], block.end))
        for (branch, part), last in zip(given_parts.items(), block.last, strict=True):
            texts[branch] += part
            seen = np.flatnonzero(block.mask[last])
            assert seen[:trunk].tolist() == list(range(trunk)) and seen[-1] == block.start + last
            # The slots in order of position say exactly this branch, no more and no less.
            said = sorted((stored[slot][1], stored[slot][0]) for slot in seen[trunk:])
            assert said == list(enumerate(texts[branch], trunk))
            assert layout.length(branch) == trunk + len(texts[branch])


@given(st.data())
def test_what_is_forgotten_is_seen_no_more(data: st.DataObject) -> None:
    trunk, count = 3, 3
    layout, stored = Layout(count, trunk, 60), dict[int, tuple[int, int]]()
    texts: list[list[int]] = [[] for _ in range(count)]
    for _ in range(6):
        told = data.draw(
            st.dictionaries(st.integers(0, count - 1), st.lists(st.integers(0, 3), min_size=1, max_size=4))
        )
        if told:
            guesses = {branch: data.draw(st.integers(0, len(part) - 1)) for branch, part in told.items()}
            block = layout.place(told, guesses)
            last = iter(block.last.tolist())
            stored.update(
                {
                    block.start + i: (int(p), int(t))
                    for i, (p, t) in enumerate(zip(block.positions, block.ids, strict=True))
                }
            )
            for branch, part in told.items():
                before = len(texts[branch]) + len(part) - guesses[branch]
                texts[branch] += part
                for end in range(before, len(texts[branch]) + 1):
                    seen = np.flatnonzero(block.mask[next(last)])[trunk:]
                    assert sorted(stored[slot] for slot in seen) == list(
                        enumerate(texts[branch][:end], trunk)
                    )
            assert next(last, None) is None
        branch = data.draw(st.integers(0, count - 1))
        keep = data.draw(st.integers(0, len(texts[branch])))
        layout.truncate(branch, trunk + keep)
        del texts[branch][keep:]
        assert layout.length(branch) == trunk + keep
    for wrong in (trunk - 1, layout.length(0) + 1):
        with pytest.raises(ValueError, match="truncate"):
            layout.truncate(0, wrong)


def test_what_begins_alike_is_read_once() -> None:
    layout = Layout(4, 3, 50)
    block = layout.place({0: [5, 6, 7], 1: [5, 6, 8], 2: [5, 6], 3: [5, 6, 7]})
    assert block.ids.tolist() == [5, 6, 7, 8] and block.positions.tolist() == [3, 4, 5, 5]
    assert block.last.tolist() == [2, 3, 1, 2] and (block.start, block.end) == (3, 7)
    # Logits of a token that an earlier call has read are asked for: it is read again, for this branch.
    again = layout.place({2: [7]})
    assert (again.ids.tolist(), again.positions.tolist(), again.start) == ([7], [5], 7)
    assert np.flatnonzero(again.mask[0]).tolist() == [0, 1, 2, 3, 4, 7]
    # Branches that said the same share what comes next, too.
    assert layout.place({0: [9], 3: [9]}).last.tolist() == [0, 0]


def test_parts_that_do_not_fit_are_refused_and_change_nothing() -> None:
    layout = Layout(2, 4, 6)
    refused: list[dict[int, list[int]]] = [{}, {0: []}, {0: [1], 1: [1, 2, 3]}]
    for wrong in refused:
        with pytest.raises(ValueError):
            layout.place(wrong)
    with pytest.raises(ValueError):
        layout.place({0: [1]}, {0: 1})
    assert layout.length(0) == 4 and layout.place({0: [1, 2]}).start == 4
    with pytest.raises(ValueError, match="branches"):
        Layout(0, 4, 6)
