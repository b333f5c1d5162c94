"""Prompt-feature attention in compiled engines: the ONNX function, and the plugin that may take its place.

Engines are built without a GPU. The plugin's launches are recorded, not executed; the same schedule runs in
Triton's interpreter in `tests.test_kernels`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks.kernel_cases import Case, inputs
from export import engines
from export.attention_function import (
    DOMAIN,
    INPUTS,
    NAME,
    add_function,
    attention_nodes,
    attention_shapes,
    inlined,
)
from export.attention_plugin import attentions, pack, require_attention
from export.engine_layers import Built
from export.typed_graph import at_precision
from kernels.plan import Problem, ReadPlan, plan_read, plan_write
from kernels.reference import DIRECTIONS, IMAGE_TO_PROMPT, PROMPT_TO_IMAGE, attend_and_norm
from kernels.schedule import EXPRESSIONS, Each, Layout, Schedule, read_schedule, write_schedule
from ppcr.errors import BundleError
from ppcr.manifest import Manifest
from runtime import attention_plugin, tensorrt_library
from runtime.attention_plugin import OPTION, Kernels, Launch, Package, number
from runtime.tensorrt_engine import rebuild
from runtime.tensorrt_library import TensorRT

TOKENS, CELLS, DIM, HEADS, HEAD_DIM = 5, 32, 32, 2, 16
EPS = 1e-5


def graph(direction: str, shared: bool, seed: int, count: int = 3) -> tuple[onnx.ModelProto, Any]:
    """A file of one attention over ``count`` expressions, and the inputs that it was made for."""
    case = Case(
        Problem(1, count, shared, TOKENS, CELLS, DIM, HEADS, HEAD_DIM, 4), direction, "fp32", False, True
    )
    given = inputs(case, seed)
    operands = [t.numpy() for t in (*given.sides, *given.weights)]
    operands = [a.T.copy() if i > 3 and a.ndim == 2 else a for i, a in enumerate(operands)]
    values, constants = [], []
    for index, (name, array) in enumerate(zip(INPUTS, operands, strict=True)):
        shape: list[Any] = list(array.shape)
        if index > 3 or len(shape) == 2:
            held = f"layer.{name.replace('_', '.')}"
            constants.append(numpy_helper.from_array(array, held))
            continue
        shape[1] = "N" if shape[1] == count else 1
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    names = [v.name for v in values]
    node = helper.make_node(
        NAME,
        [name if name in names else f"layer.{name.replace('_', '.')}" for name in INPUTS],
        ["out"],
        domain=DOMAIN,
        heads=HEADS,
        scale=HEAD_DIM**-0.5,
        eps=EPS,
        direction=direction,
    )
    rows = TOKENS if direction == PROMPT_TO_IMAGE else CELLS
    last = helper.make_node("Identity", ["out"], ["result"])
    out = helper.make_tensor_value_info("result", TensorProto.FLOAT, [1, "N", rows, DIM])
    body = helper.make_graph([node, last], "attention", values, [out], constants)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(body, opset_imports=imports, ir_version=10)
    add_function(model)
    onnx.checker.check_model(model)
    return model, given


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_function_means_what_the_reference_computes(direction: str, shared: bool) -> None:
    model, given = graph(direction, shared, seed=torch.seed() % 2**31)
    feeds = {
        name: t.numpy()
        for name, t in zip(INPUTS, given.sides, strict=False)
        if name in {value.name for value in model.graph.input}
    }
    x, x_position, y, y_position = given.sides
    wanted = attend_and_norm(
        x, x_position, y, y_position, given.weights, direction=direction, heads=HEADS, eps=EPS
    )
    for form in (model, inlined(model)):
        assert bool(form.functions) == any(True for _ in attention_nodes(form))
        session = ort.InferenceSession(form.SerializeToString(), providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, feeds)[0], wanted.numpy(), atol=2e-5, rtol=1e-4)


def schedules(direction: str, shared: bool, count: int | None) -> tuple[Schedule, ReadPlan | Any]:
    """Of the launches for ``count`` expressions, None: for any number; tiles are always those for four."""
    e: int | Each = EXPRESSIONS if count is None else count
    problem = Problem(1, 4, shared, TOKENS, CELLS, DIM, HEADS, HEAD_DIM, 2)
    at = Layout(e, e if shared else 1, 1 if shared else e, common_tokens=False, common_cells=True)
    if direction == PROMPT_TO_IMAGE:
        return read_schedule(problem, plan_read(problem, folded=True), at, EPS), at
    return write_schedule(problem, plan_write(problem, folded=True), at, EPS), at


def settled(value: Any, count: int) -> Any:
    return number((value.times, value.over), count) if isinstance(value, Each) else value


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_launches_for_any_number_are_those_for_each(direction: str, shared: bool) -> None:
    open_, _ = schedules(direction, shared, None)
    for count in (1, 3, 7, 64):
        fixed, _ = schedules(direction, shared, count)
        for step, wanted in zip(open_.steps, fixed.steps, strict=True):
            assert step.variant == wanted.variant
            assert tuple(settled(size, count) for size in step.grid) == wanted.grid
            assert tuple(settled(value, count) for value in step.arguments) == wanted.arguments
        for name, space in open_.workspaces.items():
            assert tuple(settled(size, count) for size in space.shape) == fixed.workspaces[name].shape


def test_package_survives_its_bytes() -> None:
    launch = Launch(1, "kernel", 128, 4096, (4, (1, 1)), (("address", "x"), ("i32", (13, 2)), ("f32", 0.5)))
    package = Package("fp16", INPUTS, 0, 0, {"part": 40, "lse": 300}, (launch,), (b"\n{}", b"\x00\xff"))
    again = Package.from_bytes(package.to_bytes())
    assert again.binaries == package.binaries and again.inputs == package.inputs
    assert again.to_bytes() == package.to_bytes()
    # Beginnings are aligned, and no workspace reaches into the next.
    assert again.offsets(7) == ({"part": 0, "lse": 512}, 512 + 2304)
    assert number((13, 2), 3) == 20 and number(5, 3) == 5


class Driver:
    """``cuda.bindings.driver`` that notes every launch."""

    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.loaded = 0

    def cuModuleLoadData(self, image: int) -> tuple[int, int]:
        self.loaded += 1
        return 0, image

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[int, bytes]:
        return 0, name

    def cuFuncSetAttribute(self, function: bytes, attribute: int, value: int) -> tuple[int]:
        assert attribute == 8 and 0 < value
        return (0,)

    def cuLaunchKernel(self, *arguments: Any) -> tuple[int]:
        assert len(arguments) == 11  # function, grid, block, shared, stream, parameters, extra
        self.launches.append(arguments)
        return (0,)


@pytest.fixture(scope="module")
def typed() -> tuple[onnx.ModelProto, dict[str, list[Any]]]:
    model, _ = graph(IMAGE_TO_PROMPT, False, seed=3)
    shapes = attention_shapes(model)
    at_precision(model, "fp16")
    return model, shapes


def test_plugin_launches_what_was_compiled(
    typed: tuple[onnx.ModelProto, dict[str, list[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    model, shapes = typed
    (name, attention), *others = attentions(model, shapes, usual=4).items()
    package = pack(attention, 89)
    assert name == "layer" and not others and package.dtype == "fp16"
    node = next(attention_nodes(model))
    turned = {v.name: tuple(v.dims) for v in model.graph.initializer}
    assert turned[node.input[INPUTS.index("out_weight")]] == (DIM, HEADS * HEAD_DIM)
    driver = Driver()
    monkeypatch.setattr(attention_plugin, "_driver", lambda: driver)
    kernels, count, workspace = Kernels(package), 7, 1 << 20
    addresses = {held: 4096 * (i + 1) for i, held in enumerate((*package.inputs, "out"))}
    for _ in range(2):
        kernels.run(addresses, workspace, count, stream=99)
    assert driver.loaded == len(package.binaries) == 2 and len(driver.launches) == 4
    _, size = package.offsets(count)
    written, read = list[set[int]](), list[set[int]]()
    for launch, call in zip(package.launches, driver.launches, strict=False):
        function, *grid = call[:4]
        assert function == launch.entry.encode() and call[4:9] == (launch.threads, 1, 1, launch.shared, 99)
        assert all(0 < number < 2**16 for number in grid)
        values, kinds = call[9]
        assert len(values) == len(kinds) == len(launch.arguments)
        inner = {v for v in values if isinstance(v, int) and workspace <= v < workspace + size}
        assert len(inner) == 3  # folded tokens, values and biases, written by the first and read by the next
        (written if launch is package.launches[0] else read).append(inner)
    assert written == read
    assert driver.launches[0][1:4] == (HEADS, 1, count) and driver.launches[1][2] == count


def test_compiled_entry_takes_the_arguments_of_the_schedule() -> None:
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    from kernels.compiled import compile_kernel

    step = schedules(PROMPT_TO_IMAGE, True, None)[0].steps[0]
    built = compile_kernel(step.variant, "bf16", 80)
    head = re.search(r"\.entry\s+\w+\((.*?)\)", built.assembly, re.DOTALL)
    assert head is not None
    kinds = re.findall(r"\.param\s+\.(\w+)", head[1])
    wanted = [
        "u64" if isinstance(v, str) else "f32" if isinstance(v, float) else "u32"
        for v in step.arguments
        if v is not None
    ]
    assert [kind.replace("b32", "u32").replace("b64", "u64") for kind in kinds[: len(wanted)]] == wanted
    assert set(kinds[len(wanted) :]) <= {"u64"} and built.parameters == len(kinds)


# --- engines


@pytest.fixture(scope="module")
def rtx() -> TensorRT:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install '.[tensorrt]'")
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    library = tensorrt_library.find()
    if not library.is_rtx:
        pytest.skip(f"{library.title} comes first here, and builds for the GPU it runs on alone")
    return library


def built(folder: Path, options: Sequence[str]) -> tuple[Built, bytes]:
    model, _ = graph(PROMPT_TO_IMAGE, True, seed=8)
    onnx.save(model, folder / "graph.onnx")
    job = engines.Job(
        source=str(folder / "graph.onnx"), engine=str(folder / "graph.engine"), target="sm_89",
        precision="fp16", profiles=({"N": (1, 4, 64)},), options=tuple(options),
    )  # fmt: skip
    return engines.run(job, lambda told: None), (folder / "graph.engine").read_bytes()


def test_engine_with_plugin_holds_it_in_place_of_the_layers(rtx: TensorRT, tmp_path: Path) -> None:
    plain, plain_bytes = built(tmp_path, ())
    taken, taken_bytes = built(tmp_path, (OPTION,))
    assert "PLUGIN_V3" not in plain.native and taken.native["PLUGIN_V3"] == 1
    custom = [kernel for kernel in taken.piece(0) if kernel.kind == "custom_layer"]
    assert len(custom) == 1 and custom[0].name.startswith("layer")
    assert not any(kernel.kind == "custom_layer" for kernel in plain.piece(0))
    assert len(taken.piece(0)) < len(plain.piece(0))
    # The machine code lies in the engine itself.
    assert taken_bytes.count(b"fold_tokens") > 0 and b"fold_tokens" not in plain_bytes


def test_plugin_is_made_again_from_what_an_engine_holds(
    rtx: TensorRT, typed: tuple[onnx.ModelProto, dict[str, list[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = rtx.module
    launch = Launch(0, "kernel", 32, 16, ((1, 1),), (("address", "x"), ("address", "out"), ("address", "")))
    package = Package("fp16", ("x", "tokens"), 0, 1, {"part": 8}, (launch,), (b"code",))
    attention_plugin.register(trt, {"layer": package})
    attention_plugin.register(trt, {"layer": package})  # a second bundle of the same process
    creator = trt.get_plugin_registry().get_creator(attention_plugin.NAME, attention_plugin.VERSION, "")
    assert creator is not None
    creator = attention_plugin._creator(trt)
    made = creator.create_plugin("layer", trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD)
    again = creator.create_plugin("x", made.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    assert again.package.to_bytes() == package.to_bytes()
    driver = Driver()
    monkeypatch.setattr(attention_plugin, "_driver", lambda: driver)
    described = [SimpleNamespace(dims=(1, 3, 8, 8)), SimpleNamespace(dims=(1, 6, 5, 8))]
    again.enqueue(described, described[:1], [512, 1024], [2048], 4096, 7)
    again.clone().enqueue(described, described[:1], [512, 1024], [2048], 4096, 7)
    assert driver.loaded == 1 and driver.launches[0][1] == 6
    assert driver.launches[0][9][0] == (512, 2048, 0)
    size = SimpleNamespace(max=(1, 64, 5, 8))
    assert again.get_workspace_size([size, size], []) == 512


# --- the choice


def test_manifest_tells_the_choice(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "tiny"))
    asked = []

    def pretend(job: engines.Job, progress: Any) -> Built:
        asked.append(job.options)
        Path(job.engine).write_bytes(b"engine")
        return Built("tensorrt_rtx", "1.7", 6, {}, (), 1, 1)

    monkeypatch.setattr(engines, "run", pretend)
    for options in ((), (OPTION,)):
        engines.add_engines(copy, "sm_89", "fp16", options=options, progress=lambda told: None)
        entries = Manifest.load(copy).engine_set("sm_89", "fp16")
        assert {entry.options for entry in entries.values()} == {options}
        command = rebuild(entries["mask_decoder"], copy)
        assert command.endswith(f" --{OPTION}") == bool(options)
    assert asked == [()] * 4 + [(OPTION,)] * 4
    old = Manifest.load(copy).paths("fp32")["mask_decoder"]
    plain = tmp_path / Path(old).name
    onnx.save(inlined(onnx.load(copy / old)), plain)
    with pytest.raises(BundleError, match="before its attention was a function"):
        require_attention(plain)
