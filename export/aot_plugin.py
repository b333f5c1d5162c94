"""Prompt-feature attention as ahead-of-time plugins of TensorRT 11: an engine that needs no plugin to run.

Such a plugin (`tensorrt.plugin`) is one kernel without workspace, whose arguments are the tensors it reads,
32-bit integers that follow from shapes, and the tensors it writes. So an attention's node becomes a chain of
nodes, one for each launch of its schedule; what lies between them are tensors of the graph, and every other
number is a constant of the code. TensorRT takes the assembly into the engine and launches it by itself:
neither Python nor this package is needed where the engine runs.

Written against the sources of tensorrt 11.4; the tests run those without the library below. No engine was
built with it: that library builds on a GPU alone.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import GenericAlias
from typing import Any

import onnx
from onnx import helper

from export.attention_function import INPUTS, attention_nodes
from export.attention_plugin import OPERANDS, Attention
from kernels.schedule import Each, Number, Step
from ppcr.errors import EngineError

NAMESPACE = "ppcr"
_STEP = "step"
"""The one attribute of all these plugins: the name of what they launch."""
SHARED_LIMIT = 48 * 1024
"""Most shared memory of a block that a launch may take without asking the driver for more. Whether TensorRT
asks is told nowhere."""


@dataclass(frozen=True)
class AotKernel:
    """One launch as TensorRT's plugin.

    Attributes:
        plugin: the plugin's name in `NAMESPACE`.
        dtype: of the attention. inputs, outputs: tensors by the schedule's names. shapes, wide: of the
            outputs; wide is fp32.
        expressions: the input whose axis 1 is their number.
        grid, numbers: blocks along each axis, and integer arguments.
        threads, shared: of a block, bytes.
        entry, assembly: the kernel's name in its PTX.
    """

    plugin: str
    dtype: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[Number, ...], ...]
    wide: tuple[bool, ...]
    expressions: int
    grid: tuple[Number, ...]
    numbers: tuple[Number, ...]
    threads: int
    shared: int
    entry: str
    assembly: str


def is_supported(trt: Any) -> bool:
    """Whether the library ``trt`` has ahead-of-time plugins."""
    return hasattr(trt, "QuickPluginCreationRequest") and hasattr(trt, "IPluginV3QuickAOTBuild")


def chain(attention: Attention, capability: int) -> tuple[AotKernel, ...] | None:
    """The launches of ``attention`` compiled for a compute capability (90 for 9.0), in order.

    None where one of them takes more than `SHARED_LIMIT`.
    """
    made = tuple(_kernel(attention, step, capability) for step in attention.schedule.steps)
    return made if all(kernel.shared <= SHARED_LIMIT for kernel in made) else None


def _kernel(attention: Attention, step: Step, capability: int) -> AotKernel:
    from kernels.compiled import compile_kernel
    from kernels.library import KERNELS

    spaces = attention.schedule.workspaces
    given = dict(zip(KERNELS[step.variant.kernel].arg_names, step.arguments, strict=False))
    numbers = tuple(value for value in given.values() if isinstance(value, Each))
    fixed = {name: v for name, v in given.items() if v is None or isinstance(v, (int, float))}
    built = compile_kernel(step.variant, attention.dtype, capability, fixed)
    tensors = [value for value in given.values() if isinstance(value, str)]
    written = _written(attention, step)
    inputs = tuple(name for name in tensors if name not in written)
    taken = len(tensors) + len(numbers)
    return AotKernel(
        # TensorRT knows a plugin by its name and a fixed number of inputs.
        plugin=f"{step.variant.kernel}_{len(inputs)}",
        dtype=attention.dtype,
        inputs=inputs,
        outputs=tuple(written),
        shapes=tuple(attention.out if name == "out" else spaces[name].shape for name in written),
        wide=tuple(name != "out" and spaces[name].wide for name in written),
        expressions=next(i for i, name in enumerate(inputs) if _has_expressions(attention, name)),
        grid=step.grid,
        numbers=numbers,
        threads=32 * step.variant.warps,
        shared=built.shared,
        entry=built.entry,
        assembly=without_parameters(built.assembly, taken),
    )


def _written(attention: Attention, step: Step) -> list[str]:
    """What the step writes: the schedule's workspaces that no earlier step wrote, or "out"."""
    before: set[str] = set()
    for earlier in attention.schedule.steps:
        here = [v for v in earlier.arguments if isinstance(v, str)]
        own = [v for v in here if v == "out" or (v in attention.schedule.workspaces and v not in before)]
        if earlier is step:
            return own
        before |= set(own)
    raise ValueError(f"{step.name} is no step of this attention")


def _has_expressions(attention: Attention, name: str) -> bool:
    return name in attention.schedule.workspaces or name == attention.names[attention.expressions]


def without_parameters(assembly: str, taken: int) -> str:
    """PTX whose entry has only its first ``taken`` parameters.

    Triton adds parameters for scratch memory, of which these kernels take none; TensorRT would not pass them.

    Raises:
        EngineError: the code reads one of the others.
    """
    head = re.search(r"(\.entry\s+\w+\()(.*?)(\n?\))", assembly, re.DOTALL)
    if head is None:
        raise EngineError("a compiled kernel has no entry: install the version of triton of the pins")
    parameters = head[2].split(",")
    for dropped in parameters[taken:]:
        name = dropped.split()[-1]
        if re.search(rf"\b{name}\b", assembly[head.end() :]):
            raise EngineError(f"a kernel reads {name}, which TensorRT does not pass: leave the plugin out")
    kept = ",".join(parameters[:taken])
    return assembly[: head.start()] + head[1] + kept + head[3] + assembly[head.end() :]


def replace_attentions(
    model: onnx.ModelProto, chains: Mapping[str, tuple[AotKernel, ...]]
) -> dict[str, AotKernel]:
    """Put a node for each launch in place of every attention of ``model``; the launches by `_STEP`."""
    nodes, made, steps = list(model.graph.node), [], {}
    attentions = {node.output[0] for node in attention_nodes(model)}
    for node in nodes:
        if node.output[0] not in attentions:
            made.append(node)
            continue
        direction = next(a.s.decode() for a in node.attribute if a.name == "direction")
        operands = (*OPERANDS[direction], *INPUTS[4:])
        values = dict(zip(operands, node.input, strict=True)) | {"out": node.output[0]}
        for kernel in chains[node.name]:
            step = f"{node.name}/{kernel.entry}"
            steps[step] = kernel
            for name in kernel.outputs:
                values.setdefault(name, f"{node.name}.{name}")
            made.append(
                helper.make_node(
                    kernel.plugin, [values[name] for name in kernel.inputs],
                    [values[name] for name in kernel.outputs],
                    name=step, plugin_namespace=NAMESPACE, aot=1, **{_STEP: step},
                )
            )  # fmt: skip
    del model.graph.node[:]
    model.graph.node.extend(made)
    return steps


def register(trt: Any, kernels: Mapping[str, AotKernel]) -> None:
    """Make the plugins of ``kernels`` known to the library ``trt``, for builds of this process."""
    known = _known(trt)
    known.clear()
    known.update(kernels)
    for kernel in kernels.values():
        _define(trt, kernel.plugin, len(kernel.inputs), len(kernel.outputs))


@cache
def _known(trt: Any) -> dict[str, AotKernel]:
    return {}


@cache  # a name can be registered once in a process
def _define(trt: Any, name: str, inputs: int, outputs: int) -> None:
    plugin: Any = importlib.import_module(f"{trt.__name__}.plugin")
    known, types = _known(trt), {"fp16": trt.DataType.HALF, "bf16": trt.DataType.BF16}

    def describe(*tensors: Any, **attributes: str) -> Any:
        kernel = known[attributes[_STEP]]
        count = tensors[kernel.expressions].shape_expr[1]
        own = types[kernel.dtype]
        described = tuple(
            plugin.from_shape_expr(
                (1, *(_value(plugin, size, count) for size in shape)), trt.DataType.FLOAT if wide else own
            )
            for shape, wide in zip(kernel.shapes, kernel.wide, strict=True)
        )
        return described if outputs > 1 else described[0]

    def compiled(*given: Any) -> Any:
        *tensors, step, _, _ = given  # then the outputs and the tactic, of which there is one
        kernel = known[step]
        count = tensors[kernel.expressions].shape_expr[1]
        launch = plugin.KernelLaunchParams()
        for axis, size in zip(("grid_x", "grid_y", "grid_z"), kernel.grid, strict=False):
            setattr(launch, axis, _value(plugin, size, count))
        launch.block_x, launch.shared_mem = kernel.threads, kernel.shared
        numbers = plugin.SymIntExprs(len(kernel.numbers))
        for index, number in enumerate(kernel.numbers):
            numbers[index] = plugin.SymInt32(_value(plugin, number, count))
        return kernel.entry, kernel.assembly, launch, numbers

    tensors = {f"tensor_{index}": plugin.TensorDesc for index in range(inputs)}
    written = GenericAlias(tuple, (plugin.TensorDesc,) * outputs)
    describe_as = _signature({**tensors, _STEP: str}, written if outputs > 1 else plugin.TensorDesc)
    answer = tuple[str, str, plugin.KernelLaunchParams, plugin.SymIntExprs]
    compile_as = _signature({**tensors, _STEP: str, "outputs": written, "tactic": int}, answer)
    plugin.register(f"{NAMESPACE}::{name}")(_with(describe, describe_as))
    plugin.aot_impl(f"{NAMESPACE}::{name}")(_with(compiled, compile_as))


def _signature(parameters: Mapping[str, Any], answer: Any) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=of) for name, of in parameters.items()]
    return inspect.Signature(listed, return_annotation=answer)


def _with(function: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """``function``, which takes anything, under the signature that TensorRT reads."""
    function.__signature__ = signature  # type: ignore[attr-defined]
    return function


def _value(plugin: Any, number: Number, count: Any) -> Any:
    """``number`` for the symbolic ``count`` of expressions."""
    if not isinstance(number, Each):
        return number
    grown = count if number.times == 1 else count * number.times
    return grown if number.over == 1 else plugin.cdiv(grown, number.over)
