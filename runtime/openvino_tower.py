"""The vision tower on OpenVINO: its first blocks in bfloat16, the rest in float32.

A location is read from the last digits of the image's features. The first four of ppcr-tiny's five blocks are
most of the work, and less than half of what a tower loses that is all bfloat16 (tested).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ppcr.manifest import vision_role
from runtime.bundle import Bundle
from runtime.openvino_cut import BETWEEN, cut
from runtime.openvino_library import Core, Graph, compile_model, read
from runtime.session import Float32Array

_SHARE = 0.8
_BLOCK = re.compile(r"blocks\.(\d+)\.out")


class HalfTowers:
    """`runtime.host_mllm.ImageTowers`: those beyond the first are compiled when they are needed."""

    def __init__(self, core: Core, bundle: Bundle, threads: int) -> None:
        self._core, self._graphs, self._threads = core, bundle.graphs, threads
        self._lock = threading.Lock()
        first = bundle.config.mllm.image_size
        self._towers = {first: Tower(core, bundle.graphs["vision"], threads)}

    def run(
        self, size: tuple[int, int], names: Sequence[str], patches: Float32Array
    ) -> list[npt.NDArray[Any]]:
        """Outputs called ``names`` of the tower for images of ``size``, from patches f32 [n, patch_dim]."""
        with self._lock:
            if size not in self._towers:
                self._towers[size] = Tower(self._core, self._graphs[vision_role(size)], self._threads)
            tower = self._towers[size]
        found = tower.run(patches)
        return [found[name] for name in names]


class Tower:
    """Images of one size to features. Threads may share it.

    A tower without names for its blocks, or of one block alone, is computed in float32.

    Raises:
        BundleError: OpenVINO cannot read the graph in ``path``.
    """

    def __init__(self, core: Core, path: Path, threads: int) -> None:
        whole = read(core, path)
        first, second = cut(whole, _BLOCK, _SHARE) or (None, whole)
        self._first = Graph(compile_model(core, first, path, threads, bf16=True)) if first else None
        self._second = Graph(compile_model(core, second, path, threads))

    def run(self, patches: Float32Array) -> dict[str, npt.NDArray[Any]]:
        """Patches f32 [patches, patch_dim] to the tower's outputs by name."""
        if self._first is None:
            return dict(self._second.run({"pixel_values": patches}))
        found = dict[str, npt.NDArray[Any]](self._first.run({"pixel_values": patches}))
        return found | self._second.run({BETWEEN: found.pop(BETWEEN)})
