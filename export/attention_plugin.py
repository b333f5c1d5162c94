"""What the attention plugin of `runtime.attention_plugin` holds: kernels compiled ahead of time, per node.

The kernels read matrices as torch keeps them, [out, in], so a graph that is built with the plugin gets its
matrices turned around; the function's body no longer fits it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.attention_function import INPUTS, MATRICES, Shape, attention_nodes
from kernels.plan import Problem, fits, most_folded, plan_read, plan_write
from kernels.reference import IMAGE_TO_PROMPT, PROMPT_TO_IMAGE
from kernels.schedule import EXPRESSIONS, Each, Layout, Number, Schedule, read_schedule, write_schedule
from ppcr.errors import BundleError, EngineError
from ppcr.manifest import REBUILD
from runtime.attention_plugin import Launch, Package

_DTYPES = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
# The names of a schedule's tensors for those of the node, by direction.
OPERANDS = {
    PROMPT_TO_IMAGE: ("tokens", "token_position", "image", "image_position"),
    IMAGE_TO_PROMPT: ("image", "image_position", "tokens", "token_position"),
}


def require_attention(graph: Path) -> None:
    """Raise BundleError unless the mask decoder ``graph`` has attentions that a plugin can take."""
    if not any(True for _ in attention_nodes(onnx.load(graph, load_external_data=False))):
        raise BundleError(f"{graph} was written before its attention was a function: {REBUILD}")


@dataclass(frozen=True)
class Attention:
    """What one node launches for any number of expressions.

    Attributes:
        schedule: with `EXPRESSIONS` for that number.
        names: of the schedule's tensors that are the node's inputs, in order; "out" is its output.
        like, expressions: the inputs that have the output's rows and columns, and the expressions on axis 1.
        out: shape of the output without its first dimension, which is 1.
        dtype: of all inputs and the output ("fp16", "bf16").
    """

    schedule: Schedule
    names: tuple[str, ...]
    like: int
    expressions: int
    out: tuple[Number, ...]
    dtype: str


def attentions(model: onnx.ModelProto, shapes: Mapping[str, list[Shape]], usual: int) -> dict[str, Attention]:
    """The attentions of the typed ``model`` by node.

    ``shapes`` are those of `attention_shapes`. Tiles are chosen for ``usual`` expressions and serve any
    number. The matrices of ``model`` are turned.

    Raises:
        EngineError: no Triton, or an attention that the kernels do not fit.
    """
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise EngineError(
            f"the attention plugin is compiled by triton, which cannot be imported ({error}): "
            "pip install '.[gpu]'"
        ) from None
    constants = {value.name: value for value in model.graph.initializer}
    found = {}
    for node in attention_nodes(model):
        kind = constants[node.input[INPUTS.index("q_weight")]].data_type
        if kind not in _DTYPES:
            raise EngineError(f"the attention plugin computes in fp16 or bf16, {node.name} does not")
        found[node.name] = _attention(node, shapes[node.name], _DTYPES[kind], usual)
        for index, name in enumerate(INPUTS):
            if name in MATRICES:
                node.input[index] = _turned(model, constants, node.input[index])
    return found


def _turned(model: onnx.ModelProto, constants: dict[str, TensorProto], name: str) -> str:
    new = f"{name}.rows"
    if new not in constants:
        matrix = numpy_helper.to_array(constants[name])
        rows = np.ascontiguousarray(matrix.T)
        constants[new] = helper.make_tensor(
            new, constants[name].data_type, rows.shape, rows.tobytes(), raw=True
        )
        model.graph.initializer.append(constants[new])
    return new


def _attention(node: onnx.NodeProto, given: list[Shape], dtype: str, usual: int) -> Attention:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    direction = attributes["direction"].decode()
    operands = OPERANDS[direction]
    shapes = dict(zip((*operands, *INPUTS[4:]), given, strict=True))
    tokens, image = shapes["tokens"], shapes["image"]
    inner, heads = shapes["q_bias"][0], attributes["heads"]
    sizes = (*tokens[2:], *image[2:], inner)
    if not all(isinstance(size, int) for size in sizes) or tokens[0] != 1 or image[0] != 1:
        raise EngineError(f"the attention plugin needs fixed sizes of one image: {node.name} has {given[:4]}")
    n, c, m, _, inner = (int(size) for size in sizes)
    shared = image[1] == 1
    problem = Problem(1, usual, shared, n, m, c, heads, inner // heads, itemsize=2)
    if not fits(c, heads, inner // heads) or n > most_folded(c) or m % 16:
        raise EngineError(
            f"the attention plugin takes up to {most_folded(c)} tokens and cells in sixteens at widths of "
            f"powers of two, {node.name} has {n} tokens of {c} and {m} cells: leave --attention-plugin out"
        )
    at = Layout(
        expressions=EXPRESSIONS, group=EXPRESSIONS if shared else 1, features=1 if shared else EXPRESSIONS,
        common_tokens=len(shapes["token_position"]) == 2, common_cells=len(shapes["image_position"]) == 2,
    )  # fmt: skip
    eps = float(attributes["eps"])
    if direction == PROMPT_TO_IMAGE:
        schedule = read_schedule(problem, plan_read(problem, folded=True), at, eps)
    else:
        schedule = write_schedule(problem, plan_write(problem, folded=True), at, eps)
    names, out = (*operands, *INPUTS[4:]), (EXPRESSIONS, m if operands[0] == "image" else n, c)
    return Attention(schedule, names, 0, operands.index("tokens"), out, dtype)


def pack(attention: Attention, capability: int) -> Package:
    """Compile the kernels of ``attention`` for a compute capability (89 for 8.9) and note their launches."""
    from kernels.compiled import compile_kernel

    schedule, launches, binaries = attention.schedule, [], []
    for step in schedule.steps:
        built = compile_kernel(step.variant, attention.dtype, capability)
        binaries.append(built.binary)
        arguments = [_argument(value) for value in step.arguments if value is not None]
        # Triton's own parameters come last: scratch memory, of which these kernels take none.
        arguments += [("address", "")] * (built.parameters - len(arguments))
        launches.append(
            Launch(
                binary=len(binaries) - 1, entry=built.entry, threads=32 * step.variant.warps,
                shared=built.shared, grid=tuple(map(_number, step.grid)), arguments=tuple(arguments),
            )
        )  # fmt: skip
    spaces = {
        name: _each(space.shape) * (4 if space.wide else 2) for name, space in schedule.workspaces.items()
    }
    a = attention
    return Package(a.dtype, a.names, a.like, a.expressions, spaces, tuple(launches), tuple(binaries))


def _each(shape: tuple[Number, ...]) -> int:
    """Elements for each expression."""
    return prod(size.times if isinstance(size, Each) else size for size in shape)


def _argument(value: str | Number | float) -> tuple[str, object]:
    if isinstance(value, str):
        return "address", value
    return ("f32", value) if isinstance(value, float) else ("i32", _number(value))


def _number(value: Number) -> int | tuple[int, int]:
    return (value.times, value.over) if isinstance(value, Each) else value


def parser_environment(folder: Path) -> Mapping[str, str]:
    """Variables of a process whose parser of TensorRT-RTX is to take plugins; links go into ``folder``.

    The parser looks for ``libtensorrt_rtx.so`` when it meets a plugin; the wheels hold it with a version in
    its name alone.
    """
    try:
        libraries = Path(str(importlib.import_module("tensorrt_rtx_libs").__file__)).parent
    except ImportError:
        return {}
    for library in libraries.glob("libtensorrt_rtx.so.*"):
        (folder / "libtensorrt_rtx.so").symlink_to(library)
        break
    known = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), known]))}
