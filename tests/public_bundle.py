"""Bundles around small random public MLLMs, with the segmenter of the factory; and what engines compile."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from export import engines, pretrained_bundle
from export.build_engines import main
from export.bundle import GRAPHS
from export.constants import is_outside, outside_bytes
from export.engine_job import Job, typed_model
from ppcr.manifest import Manifest
from tests import factory
from tests.test_pretrained_bundle import make_checkpoint


def make_public(family: str, root: Path, precisions: tuple[str, ...]) -> Path:
    """A bundle of ``family`` at ``precisions`` below ``root``."""
    checkpoint, bundle = make_checkpoint(family, root / "checkpoint"), root / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        for role in ("image_encoder", "mask_decoder"):
            graph = (factory.random_bundle() / GRAPHS[role]).read_bytes()
            patch.setattr(
                pretrained_bundle, f"write_{role}", lambda _, path, graph=graph: path.write_bytes(graph)
            )
        options = ["--checkpoint", str(checkpoint), "--output", str(bundle)]
        assert main([*options, "--precision", ",".join(precisions), "--no-parity"]) == 0
    return bundle


def typed(bundle: Path, role: str, precision: str, folder: Path) -> tuple[Job, onnx.ModelProto]:
    """The job of an engine, and the whole graph that it compiles; ``folder`` takes files meanwhile."""
    job = engines.make_job(Manifest.load(bundle), bundle, role, "sm_89", precision, "x.engine")
    model, _ = typed_model(job, folder)
    for value in model.graph.initializer:
        if is_outside(value):
            raw = outside_bytes(value, Path(job.source).parent, folder).tobytes()
            kind, dims = value.data_type, list(value.dims)
            value.CopyFrom(onnx.TensorProto(name=value.name, data_type=kind, dims=dims, raw_data=raw))
    onnx.checker.check_model(model)
    return job, model
