"""What speaks against each engine on this machine, found out without loading its library.

Every check raises EngineError or BundleError with one line; coming back says nothing speaks against it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ppcr.errors import EngineError
from ppcr.manifest import ROLES, Manifest, parity_key
from runtime.bundle import AUTO
from runtime.cuda_driver import first_gpu

BF16 = "bf16"


def engine_precision(name: str, manifest: Manifest, wanted: str) -> str:
    """What the engine ``name`` computes in when ``wanted`` is asked for ("auto": as the engine sees fit).

    A precision other than that of the bundle's graphs is taken unasked only where its parity gate passed.

    Raises:
        BundleError: the bundle does not hold that precision, or no engines of it.
    """
    if name == "tensorrt":
        entries = manifest.engine_set(first_gpu().target, None if wanted == AUTO else wanted)
        return entries["decoder"].precision
    if name == "openvino" and wanted in (AUTO, BF16):
        return _openvino_precision(manifest, wanted)
    chosen = manifest.default_precision if wanted == AUTO else wanted
    manifest.paths(chosen)
    return chosen


def graph_precision(name: str, manifest: Manifest, computed: str) -> str:
    """The bundle's precision that has to be read for an engine that computes in ``computed``."""
    if name == "tensorrt":
        return manifest.default_precision
    return "fp32" if name == "openvino" and computed == BF16 else computed


def _openvino_precision(manifest: Manifest, wanted: str) -> str:
    gate = manifest.parity.get(parity_key("openvino", BF16))
    default = manifest.default_precision
    if wanted == BF16 or (default == "fp32" and gate is not None and gate.passed):
        manifest.paths("fp32")
        return BF16
    return default


def require_tensorrt(manifest: Manifest, checkpoint: Path | None) -> None:
    gpu = first_gpu()
    _require_plain(manifest)
    if all(importlib.util.find_spec(name) is None for name in ("tensorrt", "tensorrt_rtx")):
        raise EngineError("neither tensorrt nor tensorrt_rtx is installed")
    manifest.engine_set(gpu.target)


def require_openvino(manifest: Manifest, checkpoint: Path | None) -> None:
    if importlib.util.find_spec("openvino") is None:
        raise EngineError("it is not installed: pip install '.[openvino]'")
    _require_plain(manifest)


def require_onnxruntime(manifest: Manifest, checkpoint: Path | None) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        raise EngineError("it is not installed: pip install onnxruntime")


def _require_plain(manifest: Manifest) -> None:
    roles = {role for held in manifest.precisions.values() for role in held}
    several = any(role.startswith("vision_") and role[7:8].isdigit() for role in roles - set(ROLES))
    if manifest.shapes.deepstack or several:
        raise EngineError("it takes MLLMs of one image size without DeepStack alone")


CHECKS = {
    "tensorrt": require_tensorrt,
    "openvino": require_openvino,
    "onnxruntime": require_onnxruntime,
}
"""By engine; those of ``runtime.session.BACKENDS`` without one tell when they are loaded."""
