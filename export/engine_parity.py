"""Any engine of the runtime held to the parity gate on a bundle; the manifest keeps the figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from export.parity import Cases, Progress, judge
from ppcr.checkpoint import Checkpoint
from ppcr.errors import CheckpointError, PPCRError
from ppcr.manifest import Manifest, Parity, parity_key
from ppcr.model.reference import ReferencePipeline
from runtime import selection
from runtime.engine_checks import BF16, FP32, gate_name
from runtime.pipeline import Pipeline

FASTER: tuple[tuple[str, str], ...] = (("openvino", BF16),)
"""Engines of this machine's processor, and precisions of theirs, that "auto" takes once they have passed."""


def check_engine(
    bundle: Path, source: Path, engine: str, precision: str, scenes: int, progress: Progress
) -> tuple[str, Parity]:
    """Measure the engine called ``engine`` and write its figures, passed or failed, into the manifest.

    Args:
        source: folder of the checkpoint that the bundle was made from.
        precision: one that the engine computes in, or "auto".
        scenes: how many held-out scenes, unless these cannot tell (`export.parity.judge`).

    Returns:
        where in the manifest's ``parity`` they are, and the figures. A failed engine is not chosen by itself.

    Raises:
        CheckpointError: the bundle was made from another one. EngineError: the engine cannot run here.
    """
    checkpoint = Checkpoint.open(source)
    if checkpoint.source_hash() != Manifest.load(bundle).source:
        raise CheckpointError(f"{bundle} was not made from {source}: give its checkpoint with --checkpoint")
    with Pipeline.load(bundle, engine=engine, precision=precision, checkpoint=source) as pipeline:
        cases = Cases(ReferencePipeline.load(checkpoint), scenes, progress)
        parity = judge(pipeline, cases, progress)
        key = parity_key(gate_name(engine), str(pipeline.engine["precision"]))
    # Read again: a measurement takes minutes, in which engines may have been added.
    manifest = Manifest.load(bundle)
    dataclasses.replace(manifest, parity={**manifest.parity, key: parity}).save(bundle)
    return key, parity


def faster_here(manifest: Manifest) -> list[tuple[str, str]]:
    """Those of `FASTER` that can run the bundle here, and that "auto" would take if they passed."""
    found = []
    for engine, precision in FASTER:
        try:
            candidate = selection.choose(manifest, engine, precision=precision)
        except PPCRError:
            continue  # not installed, or not on this processor
        if manifest.default_precision == FP32:
            found.append((candidate.name, candidate.precision))
    return found


def measure_faster(bundle: Path, cases: Cases, progress: Progress) -> dict[str, Parity]:
    """Figures of `faster_here` over ``cases``, as the manifest's ``parity`` keeps them."""
    figures = {}
    for engine, precision in faster_here(Manifest.load(bundle)):
        with Pipeline.load(bundle, engine=engine, precision=precision) as pipeline:
            figures[parity_key(engine, precision)] = judge(pipeline, cases, progress)
    return figures
