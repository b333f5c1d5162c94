"""How large the values get that products read: measured by running a bundle's fp32 graphs on scenes."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper

from export.constants import product_weights
from export.parity import Progress, scenes_of
from ppcr.data.graph import Split
from ppcr.errors import BundleError
from ppcr.manifest import DATA, REBUILD, ROLES, Manifest
from runtime.bundle import Bundle
from runtime.onnxruntime_library import open_graph
from runtime.onnxruntime_segmenter import OnnxSegmenter
from runtime.onnxruntime_session import OnnxMLLM, Towers
from runtime.pipeline import Pipeline
from runtime.session import Sessions

SCENES = 16
SPLIT: Split = "train"
"""Not that of the parity gate."""
_PRECISION = "fp32"
_MARK = "range of "
# Raw coordinates, a handful of tokens, and the weights a mask is drawn with: cheap, and each error shows.
_KEPT = {"mask_decoder": r"^prompt_encoder\.|_heads?\."}


def calibrate(bundle: Path, progress: Progress, *, scenes: int = SCENES) -> dict[str, dict[str, float]]:
    """By role and name of a matrix: the largest magnitude that it was multiplied by in ``scenes`` scenes.

    Images of the bundle's first size alone are looked at. ``progress`` is told of every scene.

    Raises:
        BundleError: the bundle holds no fp32 graphs.
    """
    if _PRECISION not in Manifest.load(bundle).precisions:
        raise BundleError(f"fp8 is calibrated with fp32 graphs, which this bundle lacks: {REBUILD}")
    held = Bundle.load(bundle, precision=_PRECISION)
    with tempfile.TemporaryDirectory(prefix="ppcr-calibration-") as name:
        watched = {role: Watched.open(held.graphs[role], role, Path(name)) for role in ROLES}
        opened: dict[str, Any] = dict(watched)
        towers, decoder = Towers(opened["vision"], held, 1), opened["decoder"]
        mllm = OnnxMLLM(towers, (decoder, decoder), held)
        segmenter = OnnxSegmenter(opened["image_encoder"], opened["mask_decoder"])
        with Pipeline(held, Sessions(mllm, segmenter), threads=1, engine="calibration") as pipeline:
            for image, example in scenes_of(SPLIT, scenes):
                pipeline.open(image).segment(example.expressions[0].text)
                progress("calibration")
    return {role: graph.ranges for role, graph in watched.items()}


class Watched:
    """An onnxruntime session whose graph also says how large the values are that its products read.

    Attributes:
        ranges: by the name of the matrix, the largest magnitude of all runs so far.
    """

    def __init__(self, session: ort.InferenceSession, read: Mapping[str, Sequence[str]]) -> None:
        """read: matrices by the name of the output that tells of what they are multiplied by."""
        self._session, self._read = session, read
        self.ranges = {weight: 0.0 for weights in read.values() for weight in weights}
        self._told = {name: ort.OrtValue.ortvalue_from_numpy(np.zeros((), np.float32)) for name in read}

    @classmethod
    def open(cls, graph: Path, role: str, folder: Path) -> Watched:
        """The fp32 graph of ``role``; what is opened lies in ``folder``."""
        model = onnx.load(graph, load_external_data=False)
        read = watch(model, _KEPT.get(role, ""))
        place = folder / graph.name
        onnx.save(model, place)
        weights = graph.with_name(graph.name + DATA)
        if weights.is_file():
            _link(weights, folder / weights.name)
        return cls(open_graph(place, 1), read)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def get_outputs(self) -> list[Any]:
        return [value for value in self._session.get_outputs() if value.name not in self._read]

    def io_binding(self) -> ort.IOBinding:
        binding = self._session.io_binding()
        for name, value in self._told.items():
            binding.bind_ortvalue_output(name, value)
        return binding

    def run_with_iobinding(self, binding: ort.IOBinding) -> None:
        self._session.run_with_iobinding(binding)
        self._note([value.numpy() for value in self._told.values()])

    def run(self, names: Sequence[str], feed: dict[str, Any]) -> list[Any]:
        found: list[Any] = self._session.run([*names, *self._read], feed)
        self._note(found[len(names) :])
        return found[: len(names)]

    def run_with_ort_values(self, names: Sequence[str], feed: dict[str, Any]) -> list[Any]:
        found: list[Any] = self._session.run_with_ort_values([*names, *self._read], feed)
        self._note([value.numpy() for value in found[len(names) :]])
        return found[: len(names)]

    def _note(self, found: Sequence[Any]) -> None:
        for weights, value in zip(self._read.values(), found, strict=True):
            for weight in weights:
                self.ranges[weight] = max(self.ranges[weight], float(value))


def watch(model: onnx.ModelProto, kept: str = "") -> dict[str, list[str]]:
    """Give ``model`` an output for each value that products with constant matrices read: its range.

    Returns the matrices by output. Those whose names match ``kept`` are left out.
    """
    weights = {value.name for value in product_weights(model)}
    weights -= {name for name in weights if kept and re.search(kept, name)}
    read: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            read.setdefault(node.input[0], []).append(node.input[1])
    for name in read:
        size, largest = f"size of {name}", _MARK + name
        nodes = [
            helper.make_node("Abs", [name], [size], name=f"Size_{name}"),
            helper.make_node("ReduceMax", [size], [largest], name=f"Range_{name}", keepdims=0),
        ]
        model.graph.node.extend(nodes)
        value = helper.make_tensor_value_info(largest, onnx.TensorProto.FLOAT, [])
        model.graph.output.append(value)
    return {_MARK + name: found for name, found in read.items()}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
