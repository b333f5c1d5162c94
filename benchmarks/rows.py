"""Which rows the latency benchmark has: every engine at every precision that it can run a bundle at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ppcr.errors import PPCRError, UsageError
from ppcr.manifest import Manifest
from runtime import selection
from runtime.bundle import AUTO
from runtime.engine_checks import OWN_PRECISIONS, has_gpu
from runtime.session import BACKENDS

DEFAULT, ALL = "onnxruntime", "all"
# Engines that compute on a GPU where there is one: plain torch then does so too, and floors are the GPU's.
_GPU_ENGINES = frozenset({"tensorrt", "tensorrt_llm", "torch", "onnxruntime-cuda"})


@dataclass(frozen=True)
class RowPlan:
    """One engine at one precision, and whether it computes on a GPU."""

    engine: str
    precision: str
    on_gpu: bool = False

    @property
    def name(self) -> str:
        """The row's: its precision, and the engine where that is not the usual one."""
        return self.precision if self.engine == DEFAULT else f"{self.engine} {self.precision}"


def engines_named(given: str) -> list[str]:
    """What ``--engine`` says: names separated by commas, "auto" and "all" among them.

    Raises:
        UsageError: one is not known, or there is none.
    """
    names = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
    known = (AUTO, ALL, *BACKENDS)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        told = f"unknown engine {unknown[0]!r}" if unknown else "--engine takes names separated by commas"
        raise UsageError(f"{told}; the engines are: {', '.join(known)}")
    return names


def plan(
    bundle: Path,
    manifest: Manifest,
    engines: Sequence[str],
    precisions: Sequence[str] | None,
    *,
    checkpoint: Path | None = None,
) -> tuple[list[RowPlan], dict[str, str]]:
    """The rows that can be tried, and by name why others cannot.

    engines: as `engines_named` gives them; "all" are those that "auto" would try on this machine.
    precisions: of every engine; None: those the bundle holds, and those an engine has beside them; of
        "auto" the one it takes.
    checkpoint: what the bundle was made from, for engines that read its weights.

    Raises:
        PPCRError: no row is left, or none of a precision that was asked for; says why the first is not.
    """
    found_here = selection.available(bundle, checkpoint=checkpoint) if ALL in engines else []
    usable = [candidate.name for candidate in found_here if candidate.usable]
    named = [one for engine in engines for one in (usable if engine == ALL else [engine])]
    rows: list[RowPlan] = []
    left_out = {candidate.name: candidate.reason for candidate in found_here if not candidate.usable}
    refused: dict[str, PPCRError] = {}
    run: set[str] = set()
    for engine in dict.fromkeys(named):
        for precision in precisions or _precisions_of(engine, manifest):
            try:
                found = selection.choose(bundle, engine, precision=precision, checkpoint=checkpoint)
            except PPCRError as error:
                refused.setdefault(precision, error)
                left_out[RowPlan(engine, precision).name] = str(error)
                continue
            run.add(precision)
            on_gpu = found.name in _GPU_ENGINES and has_gpu()
            rows.append(RowPlan(found.name, found.precision, on_gpu))
    for precision, reason in refused.items():
        if not rows or (precisions and precision not in run):
            raise reason
    return list(dict.fromkeys(rows)), left_out


def _precisions_of(engine: str, manifest: Manifest) -> Sequence[str]:
    own = OWN_PRECISIONS.get(engine, ())
    if engine == AUTO:
        return [AUTO]
    if engine == "tensorrt":
        return list(dict.fromkeys(entry.precision for entry in manifest.engines)) or [AUTO]
    return own if engine == "torch" else [*manifest.precisions, *own]
