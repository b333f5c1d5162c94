"""The attention as ahead-of-time plugins of TensorRT 11: what its builder would be told.

No library of TensorRT 11 is there: its Python sources run, where NVIDIA's bindings are installed, over
`tests.fake_trt_plugins`; nothing is built or executed.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto

pytest.importorskip("triton", reason="the kernels are written in Triton")

from export import aot_plugin, engine_job
from export.aot_plugin import AotKernel, chain, replace_attentions, without_parameters
from export.attention_function import attention_nodes, attention_shapes
from export.attention_plugin import Attention, attentions
from export.typed_graph import at_precision
from kernels.reference import DIRECTIONS, PROMPT_TO_IMAGE
from kernels.schedule import Each
from ppcr.errors import EngineError
from runtime.attention_plugin import number
from tests import fake_trt_plugins as fake
from tests.fake_trt_plugins import DataType
from tests.test_attention_plugin import CELLS, DIM, HEAD_DIM, HEADS, TOKENS, graph

COUNT = 7

Made = tuple[onnx.ModelProto, Attention, dict[str, AotKernel]]


def settled(value: Any) -> int:
    found: int = number((value.times, value.over) if isinstance(value, Each) else value, COUNT)
    return found


@pytest.fixture(scope="module", params=DIRECTIONS)
def made(request: pytest.FixtureRequest) -> Made:
    """A typed graph in which the launches have taken the attention's place."""
    model, _ = graph(request.param, request.param == PROMPT_TO_IMAGE, seed=4)
    shapes = attention_shapes(model)
    at_precision(model, "fp16")
    found = attentions(model, shapes, usual=4)
    ((name, attention),) = found.items()
    launches = chain(attention, 90)
    assert launches is not None
    return model, attention, replace_attentions(model, {name: launches})


def values(model: onnx.ModelProto) -> dict[str, tuple[tuple[int, ...], DataType]]:
    """Shapes and types of the graph's inputs and constants for `COUNT` expressions."""
    known = {v.name: (tuple(v.dims), DataType.HALF) for v in model.graph.initializer}
    for value in model.graph.input:
        dims = tuple(d.dim_value or COUNT for d in value.type.tensor_type.shape.dim)
        known[value.name] = dims, DataType.FLOAT
    return known


def test_a_chain_of_launches_takes_the_attentions_place(made: Made) -> None:
    model, attention, kernels = made
    assert not list(attention_nodes(model))
    produced, entries = set(values(model)), []
    for node in model.graph.node:
        assert set(node.input) <= produced, node.name
        produced |= set(node.output)
        if node.name in kernels:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert attributes == {"plugin_namespace": b"ppcr", "aot": 1, "step": node.name.encode()}
            entries.append(kernels[node.name].entry)
    assert entries == [step.variant.kernel for step in attention.schedule.steps]
    assert {value.name for value in model.graph.output} <= produced


def test_kernels_assemble_with_the_parameters_that_tensorrt_passes(made: Made, tmp_path: Path) -> None:
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(90).path
    _, attention, kernels = made
    for kernel, step in zip(kernels.values(), attention.schedule.steps, strict=True):
        head = re.search(r"\.entry\s+\w+\((.*?)\)", kernel.assembly, re.DOTALL)
        assert head is not None
        kinds = [("u64" if "64" in kind else "u32") for kind in re.findall(r"\.param\s+\.(\w+)", head[1])]
        wanted = ["u64"] * len(kernel.inputs) + ["u32"] * len(kernel.numbers) + ["u64"] * len(kernel.outputs)
        assert kinds == wanted, step.name
        assert kernel.shared <= aot_plugin.SHARED_LIMIT and kernel.threads == 32 * step.variant.warps
        source = tmp_path / f"{kernel.entry}.ptx"
        source.write_text(kernel.assembly)
        told = subprocess.run(
            [tool, "-v", "--gpu-name=sm_90a", source, "-o", tmp_path / "code"], capture_output=True, text=True
        )
        assert told.returncode == 0, told.stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in told.stderr


def test_a_parameter_that_is_read_is_not_dropped() -> None:
    head = ".visible .entry kernel(\n\t.param .u64 kernel_param_0,\n\t.param .u64 kernel_param_1\n)\n{"
    unused = head + " ld.param.b64 %rd1, [kernel_param_0]; }"
    assert without_parameters(unused, 1).count(".param .u64") == 1
    assert without_parameters(unused, 2) == unused
    with pytest.raises(EngineError, match="reads kernel_param_1"):
        without_parameters(unused + " ld.param.b64 %rd1, [kernel_param_1];", 1)
    with pytest.raises(EngineError, match="has no entry"):
        without_parameters("", 1)


@pytest.fixture(params=["stand-in", "installed"])
def library(request: pytest.FixtureRequest) -> Iterator[Any]:
    aot_plugin._known.cache_clear()
    aot_plugin._define.cache_clear()
    try:
        with (fake.installed if request.param == "installed" else fake.stand_in)() as found:
            yield found
    except ImportError as missing:
        pytest.skip(f"{missing}: pip install --no-deps tensorrt-cu13-bindings")


# Of escapes in the doc strings of NVIDIA's sources.
@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
def test_plugins_tell_shapes_launches_and_numbers(made: Made, library: Any) -> None:
    assert aot_plugin.is_supported(library)
    model, attention, kernels = made
    for _ in range(2):  # two builds of one process
        aot_plugin.register(library, kernels)
    known = values(model)
    for node in model.graph.node:
        if node.name not in kernels:
            shape, kind = known[node.input[0]]
            if node.op_type == "Cast":
                kind = DataType.HALF if node.attribute[0].i == TensorProto.FLOAT16 else DataType.FLOAT
            known[node.output[0]] = shape, kind
            continue
        kernel = kernels[node.name]
        inputs = [known[name] for name in node.input]
        outputs, launch, numbers, code = ask(library, node, inputs)
        for name, (shape, kind), wide in zip(kernel.outputs, outputs, kernel.wide, strict=True):
            expected = attention.out if name == "out" else attention.schedule.workspaces[name].shape
            assert shape == (1, *map(settled, expected))
            assert kind == (DataType.FLOAT if wide else DataType.HALF)
        grid = [settled(size) for size in kernel.grid] + [1] * (3 - len(kernel.grid))
        assert [launch[f"grid_{axis}"] for axis in "xyz"] == grid
        assert launch["block_x"] == kernel.threads and launch["shared_mem"] == kernel.shared
        assert numbers == [settled(value) for value in kernel.numbers]
        assert code[0] == kernel.entry and f".entry {kernel.entry}(" in code[1].decode()
        known |= dict(zip(node.output, outputs, strict=True))
    rows = TOKENS if attention.names[0] == "tokens" else CELLS
    assert known["result"] == ((1, COUNT, rows, DIM), DataType.FLOAT)
    assert HEADS * HEAD_DIM == DIM


def ask(library: Any, node: onnx.NodeProto, inputs: list[Any]) -> Any:
    """What a build learns from the plugin of ``node``, of either library."""
    plugin = library.plugin
    if not isinstance(plugin, fake.StandIn):
        return fake.run_real(library, node.op_type, node.name, inputs)
    name = f"ppcr::{node.op_type}"
    tensors = [plugin.from_shape_expr(*each) for each in inputs]
    outputs = plugin.described[name](*tensors, step=node.name)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    entry, assembly, launch, numbers = plugin.compiled[name](*tensors, node.name, outputs, 0)
    grid = {f"grid_{axis}": getattr(launch, f"grid_{axis}") for axis in "xyz"}
    told = {**grid, "block_x": launch.block_x, "shared_mem": launch.shared_mem}
    return [(o.shape_expr, o.dtype) for o in outputs], told, list(numbers), (entry, assembly.encode())


class Parser:
    """`OnnxParser` as far as a plugin is attached to it."""

    def __init__(self) -> None:
        self.flags: list[Any] = []

    def set_flag(self, flag: Any) -> None:
        self.flags.append(flag)


@pytest.mark.parametrize("limit", [aot_plugin.SHARED_LIMIT, 1])
def test_a_build_takes_them_where_the_library_has_them_and_the_kernels_fit(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    aot_plugin._known.cache_clear()
    aot_plugin._define.cache_clear()
    monkeypatch.setattr(aot_plugin, "SHARED_LIMIT", limit)
    known: list[dict[str, Any]] = []
    monkeypatch.setattr(engine_job, "register", lambda trt, packages: known.append(packages))
    model, _ = graph(PROMPT_TO_IMAGE, True, seed=4)
    shapes = attention_shapes(model)
    at_precision(model, "fp16")
    job = engine_job.Job(
        source="", engine="", target="sm_90", precision="fp16", profiles=({"N": (1, 4, 64)},)
    )
    parser = Parser()
    with fake.stand_in() as library:
        library.OnnxParserFlag = SimpleNamespace(ENABLE_PLUGIN_OVERRIDE=3)
        engine_job._attach_plugin(library, parser, job, model, shapes)
        kernels = list(aot_plugin._known(library).values())
    if limit > 1:
        assert [kernel.entry for kernel in kernels] == ["fold_tokens", "read_folded", "merge"]
        assert not known and not parser.flags and not list(attention_nodes(model))
    else:
        assert not kernels and list(known[0]) == ["layer"] and parser.flags == [3]
        assert len(list(attention_nodes(model))) == 1
