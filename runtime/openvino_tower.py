"""The vision tower on OpenVINO: its first blocks in bfloat16, the rest in float32.

A location is read from the last digits of the image's features. What bfloat16 loses in a block near the end
is still there in the features, what it loses in an early one is mostly averaged out by those after it: the
first three of ppcr-tiny's five blocks are more than half of the work and less than half of the error.
OpenVINO computes either a whole graph in bfloat16 or none of it, so the tower is cut in two.
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
from runtime.openvino_angles import inputs_of
from runtime.openvino_library import Core, Graph, Model, compile_model, float32, make_model, read
from runtime.openvino_library import operators as op
from runtime.session import Float32Array

_SHARE = 0.6
_BLOCK = re.compile(r"blocks\.(\d+)\.out")
_BETWEEN = "between"


class HalfTowers:
    """`runtime.onnxruntime_session.ImageTowers`: those beyond the first are compiled when they are needed."""

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
        first, second = cut(whole) or (None, whole)
        self._first = Graph(compile_model(core, first, path, threads, bf16=True)) if first else None
        self._second = Graph(compile_model(core, second, path, threads))

    def run(self, patches: Float32Array) -> dict[str, npt.NDArray[Any]]:
        """Patches f32 [patches, patch_dim] to the tower's outputs by name."""
        if self._first is None:
            return dict(self._second.run({"pixel_values": patches}))
        found = dict[str, npt.NDArray[Any]](self._first.run({"pixel_values": patches}))
        return found | self._second.run({_BETWEEN: found.pop(_BETWEEN)})


def cut(model: Model) -> tuple[Model, Model] | None:
    """``model`` up to the block at `_SHARE` of its blocks, and from there on; None where there is none.

    What lies between is the first one's output and the second one's input `_BETWEEN`. Every other output is
    in the part that it needs.
    """
    later = model.clone()
    between, given = _block_output(model), _block_output(later)
    if between is None or given is None:
        return None
    start = op.parameter(given.get_partial_shape(), float32, name=_BETWEEN)
    given.replace(start.output(0))
    start.output(0).set_names({_BETWEEN})
    end = op.result(between)
    end.output(0).set_names({_BETWEEN})
    first, second = [end], []
    for early, late in zip(model.get_results(), later.get_results(), strict=True):
        if inputs_of(late) == {_BETWEEN}:
            second.append(late)
        else:
            first.append(early)
    return make_model(first, model.get_parameters()), make_model(second, [start])


def _block_output(model: Model) -> Any:
    """The output of the last block before the cut; None where there is no such name."""
    found = {}
    for node in model.get_ordered_ops():
        for output in node.outputs():
            for name in output.get_names():
                if match := _BLOCK.fullmatch(name):
                    found[int(match[1])] = output
    return found.get(int(_SHARE * len(found)) - 1)
