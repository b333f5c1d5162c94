"""Signatures of libraries as `tests.record_signatures` and readers of their sources wrote them down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "signatures"


def table(name: str) -> dict[str, Any]:
    """The recorded table of a library."""
    loaded: dict[str, Any] = json.loads((TABLES / f"{name}.json").read_text())
    return loaded
