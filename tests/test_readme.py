"""The README's Python code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_usage_runs(root: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    code = blocks[0].replace("bundles/ppcr-tiny-cpu", str(bundle))
    code = code.replace("ppcr/assets", str(root / "ppcr/assets"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert (tmp_path / "outputs/scene_0/overlay.png").is_file()
