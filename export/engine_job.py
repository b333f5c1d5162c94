"""One TensorRT engine from one ONNX graph, in its own process: ``python -m export.engine_job < job.json``.

A failed build can leave the library unusable in its process, and a build cannot be stopped from outside but
with its process; so each engine gets one. The process reads a `Job`, writes the engine and its layers to the
places the job names, and tells of its progress in lines of JSON on stdout: ``{"phase": …}`` while it works,
``{"built": …}`` or ``{"error": …}`` at the end.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.attention_function import Shape, attention_shapes
from export.constants import is_outside, outside_bytes
from export.engine_layers import Built, read_kernels
from export.external import ExternalData
from export.typed_graph import at_precision, fix_dimensions
from ppcr.errors import EngineError, PPCRError
from runtime import tensorrt_library
from runtime.attention_plugin import OPTION, register
from runtime.tensorrt_library import OPTIONS, TensorRT

Range = tuple[int, int, int]
Report = Callable[[dict[str, Any]], None]
_NATIVE = (
    "ATTENTION_INPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING", "NORMALIZATION", "QUANTIZE", "DEQUANTIZE",
    "PLUGIN_V3",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What to build.

    Attributes:
        source: the ONNX file. engine: where the engine goes. target: "sm_89".
        precision: of `typed_graph.ENGINE_PRECISIONS`; the graph may have that type already.
        carried: graph inputs and outputs that take the engine's own type.
        fixed: dynamic dimensions by name that have one size.
        profiles: for each optimization profile, least, usual and most of every other dynamic dimension.
        options: names of `tensorrt_library.OPTIONS`, or `attention_plugin.OPTION`.
        timings: the timing cache, read and written where used.
        ranges: of `export.calibration`, with fp8.
    """

    source: str
    engine: str
    target: str
    precision: str
    carried: tuple[str, ...] = ()
    fixed: dict[str, int] = field(default_factory=dict)
    profiles: tuple[dict[str, Range], ...] = ()
    options: tuple[str, ...] = ()
    timings: str | None = None
    ranges: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Job:
        profiles = tuple(
            {k: (int(a), int(b), int(c)) for k, (a, b, c) in p.items()} for p in data["profiles"]
        )
        lists = {name: tuple(data[name]) for name in ("carried", "options")}
        return cls(**{**data, **lists, "profiles": profiles})


def build(job: Job, library: TensorRT, report: Report) -> Built:
    """Build in this process; `job.engine` is written last.

    Raises:
        EngineError: TensorRT refuses the graph or fails; says what it said first.
    """
    with tempfile.TemporaryDirectory(prefix="ppcr-graph-") as folder:
        return _build(job, library, report, Path(folder))


def _build(job: Job, library: TensorRT, report: Report, folder: Path) -> Built:
    """As `build`; constants that are too large for a model lie in ``folder`` meanwhile."""
    trt, started = library.module, time.perf_counter()
    log = _logger(trt)
    builder = trt.Builder(log)
    network = library.create_network(builder)
    parser = trt.OnnxParser(network, log)
    model, attentions = typed_model(job, folder)
    if attentions:
        _attach_plugin(trt, parser, job, model, attentions)
    # The network reads constants where they lie, in files that are mapped: until the engine is built.
    beside = {
        value.name: outside_bytes(value, Path(job.source).parent, folder)
        for value in model.graph.initializer
        if is_outside(value)
    }
    if beside:
        library.require_outside_weights()
    if not _parse(parser, job, model, beside):
        said = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise EngineError(f"{library.title} cannot read {job.source}: {said or log.first_error}")
    config = builder.create_builder_config()
    # The final layer list is told in full only then.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    library.aim(config, job.target)
    for option in job.options:
        library.require_option(option)
        if option in OPTIONS:
            config.set_flag(getattr(trt.BuilderFlag, OPTIONS[option]))
    for profile in job.profiles:
        config.add_optimization_profile(_profile(builder, network, profile))
    monitor = _monitor(trt, report)
    config.progress_monitor = monitor
    timings = attach_timings(library, config, job)
    if not library.write_engine(builder, network, config, Path(job.engine)):
        Path(job.engine).unlink(missing_ok=True)
        raise EngineError(
            f"{library.title} cannot build {Path(job.source).name} for {job.target}: {log.first_error}"
        )
    if timings is not None and job.timings:
        # A new file: the old one may be linked to that of another bundle.
        Path(job.timings).unlink(missing_ok=True)
        Path(job.timings).write_bytes(memoryview(config.get_timing_cache().serialize()))
    types = Counter(str(network.get_layer(i).type).rpartition(".")[2] for i in range(network.num_layers))
    return Built(
        flavour=library.flavour,
        version=library.version,
        bytes=Path(job.engine).stat().st_size,
        native={name: types[name] for name in _NATIVE if types[name]},
        kernels=tuple(read_kernels(log.layers)),
        activation_bytes=log.memory("Activation"),
        weight_bytes=log.memory("Weights"),
        seconds=round(time.perf_counter() - started, 2),
        peak_bytes=_peak_bytes(),
    )


def typed_model(job: Job, folder: Path) -> tuple[onnx.ModelProto, dict[str, list[Shape]]]:
    """The graph as it is compiled; shapes of the attentions for the plugin.

    Where its constants lie beside it they stay there, and new ones go into ``folder``.
    """
    model = onnx.load(job.source, load_external_data=False)
    attentions = attention_shapes(model) if OPTION in job.options else {}
    fix_dimensions(model, job.fixed)
    how: dict[str, Any] = {"carried": job.carried, "ranges": job.ranges}
    if any(is_outside(value) for value in model.graph.initializer):
        with ExternalData(folder / "typed.data") as data:
            at_precision(model, job.precision, **how, folder=Path(job.source).parent, data=data)
    else:
        at_precision(model, job.precision, **how)
    return model, attentions


def _parse(parser: Any, job: Job, model: onnx.ModelProto, beside: dict[str, np.memmap]) -> bool:
    if not beside:
        return bool(parser.parse(model.SerializeToString(), job.source))
    if not parser.load_model_proto(model.SerializeToString(), job.source):
        return False
    given = (parser.load_initializer(name, held.ctypes.data, held.nbytes) for name, held in beside.items())
    return all(given) and bool(parser.parse_model_proto())


def _peak_bytes(status: Path = Path("/proc/self/status")) -> int:
    """The most memory this process has held, mapped files included; 0 where the system does not tell."""
    told = status.read_text(encoding="utf-8") if status.is_file() else ""
    found = re.search(r"^VmHWM:\s+(\d+) kB", told, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def _attach_plugin(
    trt: Any, parser: Any, job: Job, model: onnx.ModelProto, shapes: dict[str, list[Shape]]
) -> None:
    """Ahead-of-time plugins where the library has them and takes these kernels, else `runtime`'s plugin."""
    from export import aot_plugin
    from export.attention_plugin import attentions, pack

    usual = max([profile["N"][1] for profile in job.profiles if "N" in profile], default=1)
    found, capability = attentions(model, shapes, usual), int(job.target.removeprefix("sm_"))
    if aot_plugin.is_supported(trt):
        chains = {name: aot_plugin.chain(attention, capability) for name, attention in found.items()}
        small = {name: chain for name, chain in chains.items() if chain is not None}
        if len(small) == len(chains):
            aot_plugin.register(trt, aot_plugin.replace_attentions(model, small))
            return
    register(trt, {name: pack(attention, capability) for name, attention in found.items()})
    # Without this the function's body comes before a plugin of its name.
    parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)


def _profile(builder: Any, network: Any, ranges: dict[str, Range]) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
        if any(size < 0 for size in tensor.shape):
            shapes = [
                [
                    ranges[name][k] if size < 0 else size
                    for name, size in zip(names, tensor.shape, strict=True)
                ]
                for k in range(3)
            ]
            profile.set_shape(tensor.name, *shapes)
    return profile


def attach_timings(library: TensorRT, config: Any, job: Job) -> Any:
    """Have a build begin with what earlier ones timed; the cache, or None where kernels are not timed."""
    if job.timings is None or not library.has_timing_cache:
        return None
    path = Path(job.timings)
    timings = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(timings, False)
    return timings


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps the first error and the final layer list of everything that is said."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.first_error, self.layers, self._memory = "it does not say why", "", dict[str, int]()

        def log(self, severity: Any, message: str) -> None:
            if message.startswith("Layers:"):
                self.layers = message
            elif found := re.match(r"Total (\w+) Memory: (\d+) bytes", message):
                self._memory[found[1]] = int(found[2])
            elif severity <= trt.ILogger.ERROR and self.first_error == "it does not say why":
                self.first_error = " ".join(message.split())

        def memory(self, kind: str) -> int:
            return self._memory.get(kind, 0)

    return Log()


def _monitor(trt: Any, report: Report) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Reports each step; a reader that went away cancels the build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                report({"phase": phase_name, "step": step + 1, "of": self.steps.get(phase_name, 0)})
            except OSError:
                return False
            return True

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def main() -> int:
    """Read a job from stdin and build it; the exit code is 0 or that of the error."""
    # Ctrl-C reaches the whole group; the parent decides, and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The library prints to stdout now and then: keep it for the protocol alone.
    told = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def report(message: dict[str, Any]) -> None:
        told.write(json.dumps(message) + "\n")

    data = json.load(sys.stdin)
    try:
        built = build(Job.from_dict(data), tensorrt_library.find(), report)
    except PPCRError as error:
        report({"error": str(error)})
        return error.exit_code
    report({"built": dataclasses.asdict(built)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
