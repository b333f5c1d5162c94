"""Just enough of TensorRT 11 for the Python sources of `tensorrt.plugin` to run without its library.

The sources are those of NVIDIA's wheel ``tensorrt-cu13-bindings``, where it is installed; what they call is
here. Symbolic sizes are plain numbers: an expression is computed as it is written.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum, IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

NAME = "tensorrt"


class Expression:
    """`IDimensionExpr` of a known value."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class Operation(Enum):
    SUM, SUB, PROD, FLOOR_DIV, CEIL_DIV, MAX, MIN, EQUAL, LESS = range(9)


class ExpressionBuilder:
    """`IExprBuilder`"""

    def constant(self, value: int) -> Expression:
        return Expression(value)

    def operation(self, kind: Operation, a: Expression, b: Expression) -> Expression:
        computed = {
            Operation.SUM: a.value + b.value,
            Operation.PROD: a.value * b.value,
            Operation.CEIL_DIV: -(-a.value // max(b.value, 1)),
        }
        return Expression(computed[kind])


class DataType(Enum):
    FLOAT, HALF, BF16, INT32 = range(4)


class TensorDescription:
    """`PluginTensorDesc`, and `DynamicPluginTensorDesc` of itself."""

    def __init__(self, dims: tuple[int, ...], kind: DataType) -> None:
        self.dims, self.type, self.format, self.scale = dims, kind, "LINEAR", 1.0
        self.desc = self


class Expressions(list[Any]):
    """`DimsExprs`"""

    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class Field:
    """`PluginField`"""

    def __init__(self, name: str, data: Any, kind: Any = None) -> None:
        self.name, self.type = name, kind
        self.data = np.frombuffer(data, np.int8) if isinstance(data, bytes) else data


class Registry:
    """`IPluginRegistry`"""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        key = creator.name, creator.plugin_version, namespace
        assert key not in self.creators, f"{key} is registered already"
        self.creators[key] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


class Logger:
    WARNING = 1

    def log(self, severity: int, message: str) -> None:
        pass


class FieldType(Enum):
    UNKNOWN, CHAR, INT8, INT16, INT32, INT64, FLOAT16, FLOAT32, FLOAT64 = range(9)


class Request(IntEnum):
    UNKNOWN, PREFER_JIT, PREFER_AOT, STRICT_JIT, STRICT_AOT = range(5)


def _library() -> ModuleType:
    made: Any = ModuleType(NAME)
    for name in (
        "IPluginV3", "IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickRuntime",
        "IPluginV3QuickAOTBuild", "IPluginCreatorV3Quick", "ISymExpr", "ITensor",
    ):  # fmt: skip
        setattr(made, name, type(name, (), {}))
    registry = Registry()
    made.IDimensionExpr, made.IExprBuilder, made.DimensionOperation = Expression, ExpressionBuilder, Operation
    made.DataType, made.DimsExprs, made.Logger = DataType, Expressions, Logger
    made.float32, made.int32 = DataType.FLOAT, DataType.INT32
    made.PluginTensorDesc = made.DynamicPluginTensorDesc = TensorDescription
    made.PluginField, made.PluginFieldCollection = Field, list
    made.PluginFieldType = FieldType
    made.PluginArgType, made.PluginArgDataType = SimpleNamespace(INT="INT"), SimpleNamespace(INT32="INT32")
    made.TensorFormat, made.TensorRTPhase = SimpleNamespace(LINEAR="LINEAR"), SimpleNamespace(BUILD="BUILD")
    made.Dims = type("Dims", (tuple,), {"MAX_DIMS": 8})
    made.QuickPluginCreationRequest = Request
    made.get_plugin_registry = lambda: registry
    return made


@contextmanager
def installed() -> Iterator[Any]:
    """The library with NVIDIA's own `tensorrt.plugin`; ImportError where its wheel is not installed."""
    found = importlib.util.find_spec("tensorrt_bindings")
    if found is None or not found.submodule_search_locations:
        raise ImportError("NVIDIA's bindings of TensorRT 11 are not installed")
    folder = Path(found.submodule_search_locations[0]) / "plugin"
    library: Any = _library()
    library.__path__ = [str(folder.parent)]
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == NAME}
    with mock.patch.dict(sys.modules, {NAME: library}):
        for name in before:
            if name != NAME:
                del sys.modules[name]
        library.plugin = importlib.import_module(f"{NAME}.plugin")
        yield library
    # The patch puts back what was imported before.


class StandIn:
    """`tensorrt.plugin` as far as our plugins call it, without a check of anything."""

    TensorDesc = type("TensorDesc", (), {})

    def __init__(self) -> None:
        self.described: dict[str, Any] = {}
        self.compiled: dict[str, Any] = {}

    class KernelLaunchParams:
        grid_x = grid_y = grid_z = 1

    class SymIntExprs(list[Any]):
        def __init__(self, length: int) -> None:
            super().__init__([None] * length)

    @staticmethod
    def SymInt32(value: int) -> int:
        return value

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    @staticmethod
    def from_shape_expr(shape: tuple[int, ...], dtype: DataType) -> SimpleNamespace:
        return SimpleNamespace(shape_expr=shape, dtype=dtype)

    def register(self, name: str) -> Any:
        return lambda function: self.described.setdefault(name, function)

    def aot_impl(self, name: str) -> Any:
        return lambda function: self.compiled.setdefault(name, function)


@contextmanager
def stand_in() -> Iterator[Any]:
    """The library with `StandIn` for its plugins."""
    library: Any = _library()
    library.plugin = StandIn()
    with mock.patch.dict(sys.modules, {NAME: library, f"{NAME}.plugin": library.plugin}):
        yield library


def run_real(
    library: Any, name: str, step: str, inputs: list[tuple[tuple[int, ...], DataType]]
) -> tuple[list[tuple[tuple[int, ...], DataType]], Mapping[str, int], list[int], tuple[str, bytes]]:
    """What a build asks of an ahead-of-time plugin, in its order: outputs, launch, numbers, name and code."""
    creator = library.get_plugin_registry().get_creator(name, "1", "ppcr")
    field = library.PluginField("step", step.encode(), library.PluginFieldType.CHAR)
    made = creator.create_plugin(name, "ppcr", [field], library.TensorRTPhase.BUILD, Request.STRICT_AOT)
    types = made.get_output_data_types([kind for _, kind in inputs], [len(shape) for shape, _ in inputs])
    given = [[Expression(size) for size in shape] for shape, _ in inputs]
    builder = ExpressionBuilder()
    shapes = [tuple(e.value for e in dims) for dims in made.get_output_shapes(given, [], builder)]
    outputs = list(zip(shapes, types, strict=True))
    described = [TensorDescription(*each) for each in (*inputs, *outputs)]
    made.configure_plugin(described[: len(inputs)], described[len(inputs) :])
    made.set_tactic(0)
    launch, numbers = SimpleNamespace(), Numbers()
    made.get_launch_params(given, described, len(inputs), launch, numbers, builder)
    code = made.get_kernel(described[: len(inputs)], described[len(inputs) :])
    return (
        outputs,
        {key: value.expr.value for key, value in vars(launch).items()},
        [numbers.held[i].expr.value for i in range(numbers.nbSymExprs)],
        code,
    )


class Numbers:
    """`ISymExprs`"""

    def __init__(self) -> None:
        self.nbSymExprs, self.held = 0, dict[int, Any]()

    def __setitem__(self, index: int, value: Any) -> None:
        self.held[index] = value
