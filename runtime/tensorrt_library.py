"""`tensorrt` (10, 11) or `tensorrt_rtx`, whichever imports: one name for both, and all that differs.

Both offer the same builder and runtime. TensorRT compiles for the GPU it runs on and remembers kernel
timings; TensorRT-RTX compiles for a list of compute capabilities on any machine, a GPU or none, and finishes
the kernels when an engine is loaded. Nothing outside this file asks which of the two it has.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from ppcr.errors import EngineError, UsageError
from runtime import attention_plugin

CURRENT = "current"
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
"""GPUs that engines may be asked for, by compute capability (8.0 is sm_80)."""
# TensorRT-RTX also knows SM75, but fails to build these graphs for it.
_RTX_TARGETS = ("sm_80", "sm_86", "sm_89", "sm_120")
_MODULES = ("tensorrt", "tensorrt_rtx")
_NEEDED = ("Builder", "OnnxParser", "Runtime", "NetworkDefinitionCreationFlag", "__version__")
_INSTALL = "install NVIDIA's tensorrt, or tensorrt-rtx with: pip install '.[tensorrt]'"
# Flags of the builder by the name of the option. TensorRT-RTX has them all by name, but not all behind it.
OPTIONS = {
    "version-compatible": "VERSION_COMPATIBLE",
    "strip-weights": "STRIP_PLAN",
    "weight-streaming": "WEIGHT_STREAMING",
}


@dataclass(frozen=True)
class TensorRT:
    """The library that was found.

    Attributes:
        module: its Python module.
        flavour: "tensorrt" or "tensorrt_rtx"; version: its own.
    """

    module: Any
    flavour: str
    version: str

    @property
    def is_rtx(self) -> bool:
        return self.flavour == "tensorrt_rtx"

    @property
    def title(self) -> str:
        return f"{self.flavour} {self.version}"

    @property
    def has_timing_cache(self) -> bool:
        """Whether kernels are timed while building. TensorRT-RTX keeps the calls, but they do nothing."""
        return not self.is_rtx

    def require_target(self, target: str, present: str | None) -> None:
        """Raise UsageError unless this library can compile for ``target`` ("sm_89").

        ``present`` is the GPU of this machine, None without one.
        """
        if self.is_rtx and target not in _RTX_TARGETS:
            told = f"{self.title} builds for {', '.join(_RTX_TARGETS)}, not for {target}"
            raise UsageError(
                f"{told}: use NVIDIA's tensorrt on such a GPU, or run the bundle without engines"
            )
        if not self.is_rtx and target != present:
            found = f"here {present}" if present else "and there is none here"
            cross = f"tensorrt_rtx builds for {', '.join(_RTX_TARGETS)} on any machine"
            raise UsageError(
                f"{self.title} builds for the GPU it runs on ({found}), not for {target}; {cross}"
            )

    def require_option(self, option: str) -> None:
        """Raise UsageError unless ``option`` of OPTIONS exists and can work, or is that of the plugin."""
        if option == attention_plugin.OPTION:
            if not hasattr(self.module, "IPluginV3"):
                raise UsageError(f"{self.title} has no plugins that Python can make: leave --{option} out")
            return
        if option not in OPTIONS or not hasattr(self.module.BuilderFlag, OPTIONS[option]):
            raise UsageError(f"{self.title} has no engines with --{option}")
        if self.is_rtx and option == "version-compatible":
            raise UsageError(
                f"{self.title} comes without the lean runtime that --{option} needs: leave it out"
            )

    def create_network(self, builder: Any) -> Any:
        """An empty network whose types are those of the graph."""
        return builder.create_network(1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))

    def aim(self, config: Any, target: str) -> None:
        """Have a build compile for ``target``, which `require_target` let pass."""
        if self.is_rtx:
            config.num_compute_capabilities = 1
            capability = getattr(self.module.ComputeCapability, target.replace("sm_", "SM"))
            if not config.set_compute_capability(capability, 0):
                raise EngineError(f"{self.title} does not accept {target}: install the version of the pins")

    def require_outside_weights(self) -> None:
        """Raise EngineError unless the parser takes weights that lie beside a graph."""
        if not hasattr(self.module.OnnxParser, "load_initializer"):
            raise EngineError(
                f"{self.title} cannot read graphs whose weights lie in files of their own: use 10.14 or newer"
            )

    def write_engine(self, builder: Any, network: Any, config: Any, path: Path) -> bool:
        """Build the engine into the file ``path``, piece by piece where the library can; False: it failed."""
        if not hasattr(self.module, "IStreamWriter"):
            engine = builder.build_serialized_network(network, config)
            if engine is not None:
                path.write_bytes(memoryview(engine))
            return engine is not None
        with path.open("wb") as file:
            return bool(builder.build_serialized_network_to_stream(network, config, self._writer(file)))

    def _writer(self, file: BinaryIO) -> Any:
        class Writer(self.module.IStreamWriter):  # type: ignore[misc, name-defined]
            """Takes an engine as it comes: it is never whole in memory beside its weights."""

            def __init__(self, base: Any) -> None:
                base.__init__(self)

            def write(self, data: bytes) -> int:
                return file.write(data)

        return Writer(self.module.IStreamWriter)

    def create_context(self, engine: Any, profile: int, stream: int, kernels: bytes = b"") -> tuple[Any, Any]:
        """An execution context on optimization profile ``profile``, and its cache of finished kernels.

        ``kernels`` is what an earlier process serialised from that cache. TensorRT has none: None.
        """
        cache = None
        if self.is_rtx:
            settings = engine.create_runtime_config()
            # The step is captured by the session, with its copies; a graph inside a graph gains nothing.
            settings.cuda_graph_strategy = self.module.CudaGraphStrategy.DISABLED
            cache = settings.create_runtime_cache()
            if kernels:
                cache.deserialize(kernels)
            settings.set_runtime_cache(cache)
            context = engine.create_execution_context(settings)
        else:
            context = engine.create_execution_context()
        if context is not None and profile:
            context.set_optimization_profile_async(profile, stream)
        return context, cache

    def stream_weights(self, engine: Any) -> int:
        """Have an engine that may leave weights in the host's memory keep as many as fit; their bytes.

        The library's own budget goes by what is free now; without one it would keep them all. 0: an engine
        that was not built for it.
        """
        if not engine.streamable_weights_size:
            return 0
        budget = min(engine.get_weight_streaming_automatic_budget(), engine.streamable_weights_size)
        engine.weight_streaming_budget_v2 = budget
        return int(budget)

    def create_runtime(self) -> Any:
        """What loads engines; it tells of errors on stderr."""
        return self.module.Runtime(self.module.Logger(self.module.Logger.ERROR))

    def refusal(self, runtime: Any, data: bytes) -> str:
        """Why an engine would not load here, "" if it would. Only TensorRT-RTX can tell beforehand."""
        if not self.is_rtx:
            return ""
        validity, reasons = runtime.get_engine_validity(data[: runtime.engine_header_size])
        if validity != self.module.EngineValidity.INVALID:
            return ""
        known = self.module.EngineInvalidityDiagnostics.__members__.items()
        named = [name.lower().replace("_", " ") for name, bit in known if int(reasons) & int(bit)]
        return ", ".join(named) or "it does not say why"

    def loads(self, flavour: str, version: str, options: tuple[str, ...] = ()) -> bool:
        """Whether an engine built by ``flavour`` ``version`` can be loaded with this library."""
        if flavour != self.flavour:
            return False
        if "version-compatible" in options:
            return _numbers(version)[:1] == _numbers(self.version)[:1]
        return version == self.version


@cache
def find() -> TensorRT:
    """The library of this machine; TensorRT comes before TensorRT-RTX.

    Raises:
        EngineError: neither can be imported; says why of each.
    """
    reasons = []
    for name in _MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name:
                reasons.append(f"{name} is not installed")
            else:
                reasons.append(f"{name} is installed but cannot be imported ({error})")
            continue
        except Exception as error:  # a stub, or a missing shared library: OSError, RuntimeError, and others
            reasons.append(f"{name} is installed but cannot be imported ({error})")
            continue
        missing = [part for part in _NEEDED if not hasattr(module, part)]
        if missing:
            reasons.append(f"{name} is installed as a stub without {missing[0]}")
            continue
        return TensorRT(module, name, str(module.__version__))
    raise EngineError(f"no TensorRT here: {'; '.join(reasons)}: {_INSTALL}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))
