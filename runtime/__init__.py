"""From a bundle to masks, without torch: numpy, Pillow, and one engine library.

``Pipeline.load(bundle)``, ``scene = pipe.open(image)``, ``scene.segment(expression)``. The names below load
their modules, and those the engine library, only when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.bundle import Bundle as Bundle
    from runtime.pipeline import Pipeline as Pipeline
    from runtime.pipeline import Scene as Scene
    from runtime.result import Result as Result

_HOMES = {
    "Bundle": "runtime.bundle",
    "Pipeline": "runtime.pipeline",
    "Scene": "runtime.pipeline",
    "Result": "runtime.result",
}

__all__ = ["Bundle", "Pipeline", "Result", "Scene"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
