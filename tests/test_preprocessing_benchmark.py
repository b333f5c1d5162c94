"""``benchmarks/preprocessing.py``: what it compares and what it says of it."""

from __future__ import annotations

import json

import pytest

from benchmarks import preprocessing


def test_every_family_is_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preprocessing, "SIZES", ((90, 130),))
    assert preprocessing.main(["--repeats", "2"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["family"], row["processor"]): row for row in record["rows"]}
    for family in preprocessing.FAMILIES:
        assert rows[family.name, preprocessing.OURS]["p50_s"] > 0
    pillow = [row for (_, name), row in rows.items() if name == preprocessing.PILLOW]
    assert [row["family"] for row in pillow] == ["sam", "qwen2_5_vl", "qwen3_vl"]
    assert all(row["largest_difference_steps"] < 0.01 and row["n"] == 2 for row in pillow)


def test_a_name_that_is_a_path_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert preprocessing.main(["--save", "../elsewhere"]) == 2
    assert "--save" in capsys.readouterr().err
