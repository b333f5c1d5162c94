"""What speaks against each engine on this machine, found out without loading its library.

Every check raises EngineError or BundleError with one line; coming back says nothing speaks against it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ppcr.checkpoint import SHIPPED, Checkpoint
from ppcr.errors import CheckpointError, EngineError
from ppcr.manifest import ROLES, Manifest, parity_key
from runtime.bundle import AUTO
from runtime.cuda_driver import first_gpu
from runtime.processor import has_bf16

FP32, BF16 = "fp32", "bf16"
OWN_PRECISIONS = {"openvino": (BF16,), "torch": (BF16, "fp16", FP32)}
"""What engines compute fp32 weights in, the fastest first; none of these needs graphs of its own."""


@dataclass(frozen=True)
class Asked:
    """What an engine is looked at for.

    Attributes:
        manifest: of the bundle.
        precision: as asked for, "auto" as well.
        checkpoint: that the bundle was made from, if it was given.
        named: the engine was asked for by name: it may be slow, but must be able to run.
    """

    manifest: Manifest
    precision: str = AUTO
    checkpoint: Path | None = None
    named: bool = False


def engine_precision(name: str, asked: Asked) -> str:
    """What the engine ``name`` computes in ("auto": as it sees fit).

    A precision of the engine's own is taken unasked only where its parity gate passed.

    Raises:
        BundleError: the bundle does not hold that precision, or no engines of it. EngineError: nor has the
            engine it.
    """
    manifest, wanted = asked.manifest, asked.precision
    if name == "tensorrt":
        entries = manifest.engine_set(first_gpu().target, None if wanted == AUTO else wanted)
        return entries["decoder"].precision
    own = OWN_PRECISIONS.get(name, ())
    lacking = name == "openvino" and not has_bf16()
    if wanted in own:
        if lacking:
            raise EngineError("this processor has no bfloat16 instructions: use --precision fp32")
        if name != "torch":
            manifest.paths(FP32)
        return wanted
    if name == "torch" and wanted != AUTO:
        raise EngineError(f"it computes in {', '.join(own)}, not in {wanted}")
    if wanted == AUTO and (name == "torch" or manifest.default_precision == FP32):
        label = gate_name(name)
        figures = {precision: manifest.parity.get(parity_key(label, precision)) for precision in own}
        # A bundle may have been built, and its figures taken, on another machine.
        proven = [p for p, parity in figures.items() if parity and parity.passed and not lacking]
        if proven or name == "torch":
            return proven[0] if proven else FP32
    chosen = manifest.default_precision if wanted == AUTO else wanted
    manifest.paths(chosen)
    return chosen


def graph_precision(name: str, manifest: Manifest, computed: str) -> str:
    """The bundle's precision that has to be read for an engine that computes in ``computed``."""
    if name in ("tensorrt", "torch"):
        return manifest.default_precision
    return FP32 if computed in OWN_PRECISIONS.get(name, ()) else computed


def gate_name(name: str) -> str:
    """What the manifest's parity figures call an engine here: torch on a CPU proves nothing of a GPU."""
    return "torch-cpu" if name == "torch" and not has_gpu() else name


def find_checkpoint(manifest: Manifest, given: Path | None) -> Path:
    """The folder of the checkpoint a bundle was made from: the one given, or the shipped one if it is that.

    Raises:
        EngineError: none was given, and the shipped one is another.
    """
    if given is not None:
        return given
    try:
        shipped = Checkpoint.open(SHIPPED).source_hash()
    except CheckpointError:
        shipped = ""
    if shipped != manifest.source:
        raise EngineError("it reads the checkpoint that this bundle was made from: name it with --checkpoint")
    return SHIPPED


def _tensorrt(asked: Asked) -> None:
    gpu = first_gpu()
    _require_installed("'.[tensorrt]'", "tensorrt", "tensorrt_rtx")
    asked.manifest.engine_set(gpu.target)


def _torch(asked: Asked) -> None:
    if not asked.named:
        first_gpu()
    for name in ("torch", "transformers"):
        _require_installed("'.[export]'", name)
    build = importlib.metadata.version("torch")
    if not asked.named and build.endswith("+cpu"):
        raise EngineError(f"torch {build} is built without CUDA")
    find_checkpoint(asked.manifest, asked.checkpoint)


def _onnxruntime_cuda(asked: Asked) -> None:
    first_gpu()
    _onnxruntime(asked)
    held = [name for name in ("onnxruntime-gpu", "onnxruntime") if _is_distributed(name)]
    if held == ["onnxruntime"]:
        raise EngineError("this onnxruntime is the CPU's: install onnxruntime-gpu in its place")


def _is_distributed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _openvino(asked: Asked) -> None:
    _require_installed("'.[openvino]'", "openvino")


def _onnxruntime(asked: Asked) -> None:
    _require_installed("onnxruntime", "onnxruntime")


CHECKS: dict[str, Callable[[Asked], None]] = {
    "tensorrt": _tensorrt,
    "torch": _torch,
    "onnxruntime-cuda": _onnxruntime_cuda,
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
}
"""By engine; those of ``runtime.session.BACKENDS`` without one tell when they are loaded."""


def has_gpu() -> bool:
    """Whether this machine has a GPU with a driver that works."""
    try:
        first_gpu()
    except EngineError:
        return False
    return True


def _require_installed(package: str, *names: str) -> None:
    """Raise EngineError unless one of the modules ``names`` can be found, which ``package`` brings."""
    if all(importlib.util.find_spec(name) is None for name in names):
        raise EngineError(f"{' and '.join(names)} not installed: pip install {package}")


def _require_plain(manifest: Manifest) -> None:
    roles = {role for held in manifest.precisions.values() for role in held}
    several = any(role.startswith("vision_") and role[7:8].isdigit() for role in roles - set(ROLES))
    if manifest.shapes.deepstack or several:
        raise EngineError("it takes MLLMs of one image size without DeepStack alone")
