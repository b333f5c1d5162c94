"""onnxruntime itself: opening graphs, values on a device, and what its errors mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ppcr.errors import BundleError, EngineError
from ppcr.manifest import REBUILD
from runtime.placement import Helpers, started_threads

Value: TypeAlias = ort.OrtValue
Binding: TypeAlias = ort.IOBinding


class Session(ort.InferenceSession):  # type: ignore[misc]
    """onnxruntime's, whose own threads keep off its caller's processor."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with started_threads() as threads:
            super().__init__(*args, **kwargs)
        self._helpers = Helpers(threads)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """As onnxruntime's."""
        self._helpers.step_aside()
        return super().run(*args, **kwargs)

    def run_with_ort_values(self, *args: Any, **kwargs: Any) -> Any:
        """As onnxruntime's."""
        self._helpers.step_aside()
        return super().run_with_ort_values(*args, **kwargs)

    def run_with_iobinding(self, *args: Any, **kwargs: Any) -> Any:
        """As onnxruntime's."""
        self._helpers.step_aside()
        return super().run_with_iobinding(*args, **kwargs)


def open_graph(path: Path, threads: int, providers: Sequence[Any] = ("CPUExecutionProvider",)) -> Session:
    """A graph with ``threads`` threads, as every part of a bundle is opened; by default on the CPU.

    Raises:
        BundleError: it cannot be read. EngineError: this onnxruntime lacks an operator of it, or the device
            has no room for it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    # Threads that sleep between a graph's operators cost more than a second one saves. Between runs they must
    # not spin: encoder and MLLM run side by side, and each would take the other's processor.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return Session(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if type(error).__name__ == "NotImplemented":
            told = f"onnxruntime {ort.__version__} cannot run {path}: {reason}"
            raise EngineError(f"{told}; upgrade onnxruntime") from error
        reraise_memory(error)
        raise BundleError(f"onnxruntime cannot read {path}: {reason}; {REBUILD}") from error


def reraise_memory(error: Exception) -> None:
    """Raise EngineError, with the size asked for, where ``error`` says that a device has no room left."""
    told = str(error)
    asked = re.search(r"requested buffer of size (\d+)", told)
    if asked is None and "out of memory" not in told.lower():
        return
    size = f" ({int(asked[1]) / 1e6:.1f} MB more were asked for)" if asked else ""
    cure = "close other programs, or use a smaller precision (--precision int8)"
    raise EngineError(f"out of memory{size}: {cure}") from error


def write_out_functions(path: Path, folder: Path) -> Path:
    """A copy of a graph in ``folder`` with the bodies of its functions in the place of their nodes."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / path.name)
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base but Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BundleError(f"onnxruntime cannot read {path}: {reason}; {REBUILD}") from error
    return folder / path.name


def floats_of(session: ort.InferenceSession) -> Any:
    """numpy's type of the graph's floating inputs."""
    return np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32


def on_device(array: npt.NDArray[Any], device: str) -> ort.OrtValue:
    """``array`` in memory of ``device`` ("cuda", "cpu"); on the CPU its own."""
    return ort.OrtValue.ortvalue_from_numpy(array, device, 0)


def graph_options(graph: int) -> ort.RunOptions:
    """Options of a run that is recorded as the CUDA graph of this number, then replayed; -1: of none."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def require_provider(name: str) -> None:
    """Raise EngineError unless this onnxruntime has the provider; load libraries from installed wheels."""
    if name not in ort.get_available_providers():
        told = f"onnxruntime {ort.__version__} has no {name}"
        raise EngineError(f"{told}: install onnxruntime-gpu in the place of onnxruntime")
    with suppress(Exception):  # the libraries may lie elsewhere: the session tells
        ort.preload_dlls()
