"""Prompt-feature attention inside an engine: a TensorRT plugin that launches kernels compiled beforehand.

What it launches is a `Package`: machine code, and grids and arguments that follow from the number of
expressions. It lies in the engine: neither torch nor Triton is needed where the engine runs. The plugin
must be known before such an engine is loaded: `register`.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from ppcr.errors import EngineError

NAME, VERSION = "PromptFeatureAttention", "1"
OPTION = "attention-plugin"
"""The option of engines that hold the plugin."""
_INSTALL = "install it with: pip install '.[tensorrt]'"
_ALIGNMENT = 256

Number = int | Sequence[int]
"""A number, or (times, over): expressions * times / over, rounded up."""


@dataclass(frozen=True)
class Launch:
    """One kernel: which of the package's ``binaries``, its entry, threads and bytes of shared memory.

    grid: blocks along each axis. arguments: ("address", name), ("i32", number) or ("f32", value) in order.
    """

    binary: int
    entry: str
    threads: int
    shared: int
    grid: tuple[Number, ...]
    arguments: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Package:
    """All that one attention launches.

    Attributes:
        dtype: of every input and output ("fp16", "bf16").
        inputs: names of the node's inputs, in order; "out" is its output.
        like: input whose batch, rows and columns the output has; expressions: input with their number, on
            its second axis.
        workspaces: bytes for each expression, by name.
        binaries: machine code for one compute capability.
    """

    dtype: str
    inputs: tuple[str, ...]
    like: int
    expressions: int
    workspaces: dict[str, int]
    launches: tuple[Launch, ...]
    binaries: tuple[bytes, ...]

    def to_bytes(self) -> bytes:
        head = {**asdict(self), "binaries": [len(binary) for binary in self.binaries]}
        return json.dumps(head).encode() + b"\n" + b"".join(self.binaries)

    @classmethod
    def from_bytes(cls, data: bytes) -> Package:
        head, _, rest = data.partition(b"\n")
        fields = json.loads(head)
        ends = np.cumsum(fields["binaries"]).tolist()
        binaries = tuple(rest[end - size : end] for end, size in zip(ends, fields["binaries"], strict=True))
        launches = tuple(
            Launch(**{**launch, "grid": tuple(launch["grid"]), "arguments": tuple(launch["arguments"])})
            for launch in fields["launches"]
        )
        inputs = tuple(fields["inputs"])
        return cls(**{**fields, "inputs": inputs, "launches": launches, "binaries": binaries})

    def offsets(self, expressions: int) -> tuple[dict[str, int], int]:
        """Where each workspace begins, and how large all are together."""
        places, end = {}, 0
        for name, size in self.workspaces.items():
            places[name] = end
            end += -(-size * expressions // _ALIGNMENT) * _ALIGNMENT
        return places, end


def number(value: Number, expressions: int) -> int:
    """``value`` for a number of expressions."""
    return value if isinstance(value, int) else -(-expressions * value[0] // value[1])


class Kernels:
    """The binaries of a package, loaded on the GPU of this process when they first run."""

    def __init__(self, package: Package) -> None:
        self.package = package

    @cached_property
    def functions(self) -> list[Any]:
        """A function of the driver for each launch."""
        driver = _driver()
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        modules = [
            _call("cuModuleLoadData", ctypes.addressof(ctypes.create_string_buffer(binary, len(binary))))
            for binary in self.package.binaries
        ]
        found = []
        for launch in self.package.launches:
            function = _call("cuModuleGetFunction", modules[launch.binary], launch.entry.encode())
            _call("cuFuncSetAttribute", function, most, launch.shared)
            found.append(function)
        return found

    def run(self, addresses: Mapping[str, int], workspace: int, expressions: int, stream: int) -> None:
        """Queue the launches: ``addresses`` of inputs and "out", and of `Package.offsets` bytes more."""
        places, _ = self.package.offsets(expressions)
        known = {**addresses, **{name: workspace + offset for name, offset in places.items()}, "": 0}
        for launch, function in zip(self.package.launches, self.functions, strict=True):
            values: list[int | float] = []
            kinds: list[Any] = []
            for kind, value in launch.arguments:
                values.append(
                    known[value]
                    if kind == "address"
                    else number(value, expressions)
                    if kind == "i32"
                    else float(value)
                )
                kinds.append(_KINDS[kind])
            grid = [number(size, expressions) for size in launch.grid]
            grid += [1] * (3 - len(grid))
            _call(
                "cuLaunchKernel", function, *grid, launch.threads, 1, 1, launch.shared, stream,
                (tuple(values), tuple(kinds)), 0,
            )  # fmt: skip


_KINDS = {"address": ctypes.c_void_p, "i32": ctypes.c_int32, "f32": ctypes.c_float}


@cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise EngineError(f"cuda-python cannot be used here ({error}): {_INSTALL}") from None
    return driver


def _call(name: str, *arguments: Any) -> Any:
    status, *results = getattr(_driver(), name)(*arguments)
    if int(status) != 0:
        raise EngineError(f"CUDA failed in {name} for an attention plugin: {status!r}")
    return results[0] if results else None


def register(trt: Any, packages: Mapping[str, Package] | None = None) -> None:
    """Make the plugin known to the library ``trt``, once in a process.

    ``packages`` holds what a build puts into the layer of each name. An engine that is loaded brings its own.

    Raises:
        EngineError: the library refuses it.
    """
    _creator(trt).packages = dict(packages or {})


@cache  # which also keeps it: the library does not
def _creator(trt: Any) -> Any:
    plugin, kinds = _plugin(trt), trt.PluginFieldType

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc, name-defined]
        """Makes plugins: in a build by the layer's name, from an engine by what lies in it."""

        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = NAME, VERSION, ""
            nothing = np.array([], np.int8)
            self.field_names = trt.PluginFieldCollection([trt.PluginField("package", nothing, kinds.INT8)])
            self.packages: dict[str, Package] = {}

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            if phase == trt.TensorRTPhase.BUILD:
                return plugin(self.packages[name])
            held = {field.name: field for field in fields}
            return plugin(Package.from_bytes(np.array(held["package"].data, np.int8).tobytes()))

    creator = Creator()
    if not trt.get_plugin_registry().register_creator(creator, ""):
        raise EngineError(f"{trt.__name__} {trt.__version__} does not take the plugin {NAME}")
    return creator


@cache
def _plugin(trt: Any) -> Any:
    types = {"fp16": trt.DataType.HALF, "bf16": trt.DataType.BF16}

    class Plugin(  # type: ignore[misc]
        trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime
    ):
        """One attention: its package, and its kernels once they are loaded."""

        def __init__(self, package: Package, kernels: Kernels | None = None) -> None:
            trt.IPluginV3.__init__(self)
            trt.IPluginV3OneCore.__init__(self)
            trt.IPluginV3OneBuild.__init__(self)
            trt.IPluginV3OneRuntime.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = NAME, VERSION, ""
            self.num_outputs = 1
            self.package, self.kernels = package, kernels or Kernels(package)

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.package, self.kernels)

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_output_data_types(self, inputs: Any) -> list[Any]:
            return [inputs[0]]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> list[Any]:
            shape = trt.DimsExprs(inputs[self.package.like])
            shape[1] = inputs[self.package.expressions][1]
            return [shape]

        def supports_format_combination(self, position: int, tensors: Any, count: int) -> bool:
            found = tensors[position].desc
            return bool(found.format == trt.TensorFormat.LINEAR and found.type == types[self.package.dtype])

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            pass

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            return self.package.offsets(int(inputs[self.package.expressions].max[1]))[1]

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            pass

        def get_fields_to_serialize(self) -> Any:
            # A field points at memory and does not keep it.
            self.serialised = np.frombuffer(self.package.to_bytes(), np.int8)
            field = trt.PluginField("package", self.serialised, trt.PluginFieldType.INT8)
            return trt.PluginFieldCollection([field])

        def enqueue(
            self, input_desc: Any, output_desc: Any, inputs: Any, outputs: Any, workspace: int, stream: int
        ) -> None:
            addresses = dict(zip(self.package.inputs, inputs, strict=True)) | {"out": outputs[0]}
            expressions = int(input_desc[self.package.expressions].dims[1])
            self.kernels.run(addresses, workspace, expressions, stream)

    return Plugin
