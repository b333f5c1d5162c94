"""Which engine a bundle runs on: the fastest that is usable here, and why the faster ones are not.

``choose(bundle)`` answers without loading an engine library. `load` also loads it, and falls back with one
warning where an engine that looked usable does not start.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ppcr.errors import EngineError, PPCRError, UsageError
from ppcr.manifest import Manifest, parity_key
from runtime.bundle import AUTO, Bundle
from runtime.engine_checks import CHECKS, Asked, engine_precision, gate_name, graph_precision
from runtime.session import BACKENDS, Sessions, load_sessions

ENGINES: tuple[str, ...] = ("tensorrt", "torch", "onnxruntime-cuda", "openvino", "onnxruntime")
"""What "auto" tries, fastest first. An engine of `BACKENDS` beyond these is used when it is named."""
PASSED, FAILED, UNGATED = "passed", "failed", "ungated"
# Engines that are told the precision apart from the graphs'.
_TOLD_PRECISION = ("tensorrt", "torch", "openvino")

AnyBundle = Bundle | Manifest | str | os.PathLike[str]


@dataclass(frozen=True)
class Candidate:
    """An engine, seen from one bundle on this machine.

    Attributes:
        name: of ``runtime.session.BACKENDS``.
        usable: whether it can be tried; reason: why not, in one line, else "".
        precision: what it would compute in; "" where it is not usable.
        gate: verdict of the parity figures that the manifest has of it at that precision: "passed", "failed",
            or "ungated" where there are none.
    """

    name: str
    usable: bool
    reason: str = ""
    precision: str = ""
    gate: str = UNGATED

    def __str__(self) -> str:
        if not self.usable:
            return f"{self.name}: {self.reason}"
        told = UNGATED if self.gate == UNGATED else f"parity gate {self.gate}"
        return f"{self.name} {self.precision}, {told}"


@dataclass(frozen=True)
class Started:
    """An engine at work: its bundle, both sessions, and a line for each faster engine: why not that one."""

    candidate: Candidate
    bundle: Bundle
    sessions: Sessions
    passed_over: tuple[str, ...]


def available(bundle: AnyBundle, *, precision: str = AUTO, checkpoint: Path | None = None) -> list[Candidate]:
    """Every engine of `ENGINES`, fastest first, with what speaks against it here.

    An engine whose parity gate failed is not usable, unless the bundle was shipped in spite of that.

    Raises:
        BundleError: there is no readable bundle.
    """
    asked = Asked(_manifest(bundle), precision, checkpoint)
    return [_held_to_the_gate(_examine(name, asked), asked.manifest) for name in ENGINES]


def choose(
    bundle: AnyBundle, wanted: str = AUTO, *, precision: str = AUTO, checkpoint: Path | None = None
) -> Candidate:
    """The engine called ``wanted``, or for "auto" the first usable one of `available`.

    An engine that is named is not held to the parity gate; the candidate has the verdict.

    Raises:
        UsageError: no such engine. EngineError: it is not usable here, or none is; says why.
        BundleError: there is no readable bundle.
    """
    found = _candidates(bundle, wanted, precision, checkpoint)
    return next(candidate for candidate in found if candidate.usable)


def load(
    folder: str | os.PathLike[str],
    wanted: str = AUTO,
    *,
    precision: str = AUTO,
    threads: int,
    checkpoint: Path | None = None,
) -> Started:
    """Read and check a bundle, and start the engine called ``wanted``, for "auto" the fastest that starts.

    Raises:
        UsageError, EngineError, BundleError: as `choose`; or the engine that was named, or the last that
            there is, does not start.
    """
    found = _candidates(folder, wanted, precision, checkpoint)
    last = [candidate for candidate in found if candidate.usable][-1]
    passed_over, failed = list[str](), list[str]()
    for candidate in found:
        if not candidate.usable:
            passed_over.append(str(candidate))
            continue
        try:
            bundle, sessions = _start(folder, candidate, threads, checkpoint, wanted != AUTO)
        except PPCRError as error:
            if candidate is last:
                raise
            failed.append(f"{candidate.name}: {error}")
            passed_over.append(failed[-1])
            continue
        if failed:
            told = f"{'; '.join(failed)}; {candidate.name} runs instead"
            warnings.warn(told, RuntimeWarning, stacklevel=3)
        return Started(candidate, bundle, sessions, tuple(passed_over))
    raise AssertionError("the last usable candidate was returned or raised")


def _candidates(bundle: AnyBundle, wanted: str, precision: str, checkpoint: Path | None) -> list[Candidate]:
    """What may be tried for ``wanted``, in order, at least one of it usable. Raises as `choose`."""
    if wanted != AUTO:
        if wanted not in BACKENDS:
            raise UsageError(f"unknown engine {wanted!r}; the engines are: {', '.join((AUTO, *BACKENDS))}")
        return [_examine(wanted, Asked(_manifest(bundle), precision, checkpoint, named=True))]
    found = available(bundle, precision=precision, checkpoint=checkpoint)
    if not any(candidate.usable for candidate in found):
        if precision != AUTO:
            _manifest(bundle).paths(precision)
        raise EngineError(f"no engine can run this bundle here: {'; '.join(map(str, found))}")
    return found


def _examine(name: str, asked: Asked) -> Candidate:
    """What there is to say of one engine; where it was named, what speaks against it is raised."""
    try:
        if name in CHECKS:
            CHECKS[name](asked)
        computed = engine_precision(name, asked)
    except PPCRError as error:
        if asked.named:
            raise type(error)(f"engine {name!r} cannot be used here: {error}") from None
        return Candidate(name, False, str(error))
    parity = asked.manifest.parity.get(parity_key(gate_name(name), computed))
    gate = UNGATED if parity is None else PASSED if parity.passed else FAILED
    return Candidate(name, True, precision=computed, gate=gate)


def _held_to_the_gate(candidate: Candidate, manifest: Manifest) -> Candidate:
    # What the bundle was built for stays the last resort: whoever shipped it has seen its figures.
    if candidate.gate != FAILED or manifest.parity_failure_allowed or candidate.name == ENGINES[-1]:
        return candidate
    reason = f"at {candidate.precision} it failed the parity gate"
    return replace(candidate, usable=False, reason=reason, precision="")


def _start(
    folder: str | os.PathLike[str], candidate: Candidate, threads: int, checkpoint: Path | None, named: bool
) -> tuple[Bundle, Sessions]:
    manifest = Manifest.load(Path(folder))
    bundle = Bundle.load(folder, precision=graph_precision(candidate.name, manifest, candidate.precision))
    options: dict[str, Any] = {}
    if candidate.name in _TOLD_PRECISION:
        options["precision"] = candidate.precision
    if candidate.name == "torch":
        # Named, it may run on the CPU; as the fastest engine of a machine it must not.
        options.update(checkpoint=checkpoint, device=None if named else "cuda")
    return bundle, load_sessions(candidate.name, bundle, threads=threads, **options)


def _manifest(bundle: AnyBundle) -> Manifest:
    if isinstance(bundle, Manifest):
        return bundle
    return bundle.manifest if isinstance(bundle, Bundle) else Manifest.load(Path(bundle))
