"""Prompt-feature attention without a GPU: kernels interpreted and compiled, the op, the decoder on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import kernel
from benchmarks.kernel import card, interpreted, worst
from benchmarks.kernel_cases import BOUNDS, TOKEN_STEPS, Case, cases, inputs, poisoned
from benchmarks.kernel_count import Count, decoder_kernels
from benchmarks.kernel_floor import floor_of
from benchmarks.kernel_masks import LEAST_IOU
from benchmarks.kernel_resources import SAM, SAM_LONG, SHIPPED, variants
from kernels.op import using
from kernels.plan import (
    Problem,
    ceil,
    fits,
    launches,
    most_tokens,
    plan_read,
    plan_write,
    tile,
)
from kernels.reference import DIRECTIONS, IMAGE_TO_PROMPT, PROMPT_TO_IMAGE, Weights, attend_and_norm
from kernels.token_op import token_attention, token_mlp
from ppcr.model.segmenter import Segmenter, SegmenterConfig

SMALL = SegmenterConfig(
    image_size=64, dim=32, high_res=(16, 8), encoder_blocks=1, context_dim=32, context_blocks=1,
    text_layers=1, heads=2,
)  # fmt: skip


# --- the reference


def double_case(direction: str, *, masked: bool, shared: bool = True) -> tuple[Any, dict[str, Any]]:
    case = Case(Problem(2, 3, shared, 5, 11, 32, 2, 16, 4), direction, "fp32", masked, False)
    given = inputs(case, seed=torch.seed() % 2**31).to(dtype=torch.float64)
    settings = {"direction": direction, "heads": 2, "eps": 1e-5, "mask": given.mask, "after": given.after}
    return given, settings


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_reference_equals_multihead_attention_written_with_loops(direction: str, shared: bool) -> None:
    given, settings = double_case(direction, masked=True, shared=shared)
    x, x_position, y, y_position = given.sides
    w, out = given.weights, attend_and_norm(x, x_position, y, y_position, given.weights, **settings)
    for image in range(2):
        for expression in range(3):
            keep = given.mask[image, expression]

            def own(t: Tensor, image: int = image, expression: int = expression) -> Tensor:
                return t if t.dim() == 2 else t[image, expression if t.shape[1] > 1 else 0]

            rows, places, keys, key_places = (own(t) for t in (x, x_position, y, y_position))
            if direction == IMAGE_TO_PROMPT:
                keys, key_places = keys[keep], key_places[keep]
            else:
                rows, places = rows[keep], places[keep]
            read = torch.zeros(len(rows), 32, dtype=torch.float64)
            for h in range(2 if len(keys) else 0):
                part = slice(16 * h, 16 * h + 16)
                q = (rows + places) @ w.q_weight[part].T + w.q_bias[part]
                k = (keys + key_places) @ w.k_weight[part].T + w.k_bias[part]
                v = keys @ w.v_weight[part].T + w.v_bias[part]
                read[:, part] = torch.softmax(q @ k.T / 4.0, -1) @ v
            wanted = rows + read @ w.out_weight.T + w.out_bias
            wanted = nn.functional.layer_norm(wanted, (32,), w.norm_weight, w.norm_bias, 1e-5)
            got = out[image, expression]
            if direction == IMAGE_TO_PROMPT:
                wanted = wanted + given.after[image, expression]
            else:
                assert not got[~keep].any()
                got = got[keep]
            torch.testing.assert_close(got, wanted)


# --- the plan


def test_plan_covers_every_cell_and_row_once() -> None:
    for prompts, tokens, cells in ((1, 1, 1), (1, 13, 1024), (3, 133, 4099), (64, 7, 4096), (1, 64, 17)):
        for itemsize in (2, 4):
            problem = Problem(1, prompts, True, tokens, cells, 256, 8, 16, itemsize)
            plan = plan_read(problem)
            assert plan.chunk % plan.block_cells == 0
            assert (plan.splits - 1) * plan.chunk < cells <= plan.splits * plan.chunk
            assert plan.rows == prompts * tokens * (8 if plan.folded else 1)
            write = plan_write(problem)
            assert not write.folded or tokens <= write.block_tokens


def test_plan_folds_where_few_queries_read_an_image() -> None:
    assert plan_read(SAM).folded and plan_write(SAM).folded
    assert not plan_read(replace(SAM, prompts=64)).folded  # one projection of the image serves all
    assert plan_read(replace(SAM, prompts=64, shared=False)).folded
    assert not plan_read(replace(SAM, tokens=133)).folded and not plan_write(replace(SAM, tokens=133)).folded
    assert [tile(n, most=64) for n in (1, 16, 17, 64, 900)] == [16, 16, 32, 64, 64] and ceil(7, 3) == 3
    assert fits(256, 8, 16) and fits(128, 2, 64)
    assert not fits(256, 8, 24) and not fits(96, 4, 16) and not fits(512, 8, 64)


def test_floor_counts_shared_features_once() -> None:
    one, many = SAM, replace(SAM, prompts=64)
    image = 4096 * 256 * 2
    for direction in DIRECTIONS:
        assert floor_of(one, direction).bytes > 2 * image  # features and position
    more = floor_of(many, PROMPT_TO_IMAGE).bytes - floor_of(one, PROMPT_TO_IMAGE).bytes
    assert more < 63 * image / 10
    written = floor_of(many, IMAGE_TO_PROMPT).bytes - floor_of(one, IMAGE_TO_PROMPT).bytes
    assert 63 * image < written < 64 * image
    assert len(card()) == 10


# --- the kernels


@pytest.fixture(scope="module")
def interpreter_rows() -> list[dict[str, Any]]:
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    return interpreted(seed=torch.seed() % 2**31)


def test_kernels_equal_float64_in_the_interpreter(interpreter_rows: list[dict[str, Any]]) -> None:
    names = [row["case"] for row in interpreter_rows]
    assert names[: len(cases())] == [case.name for case in cases()]
    assert names[len(cases()) :] == [f"{step}-{dtype}" for dtype in BOUNDS for step in TOKEN_STEPS]
    for row in interpreter_rows:
        assert row["error"] <= BOUNDS[row["dtype"]], row
        assert row["matters"] > 0.2, row
    assert all(0 < value < float("inf") for value in worst(interpreter_rows).values())


def test_worst_sees_what_is_not_a_number() -> None:
    rows = [{"dtype": name, "error": value} for name in BOUNDS for value in (1e-7, float("nan"))]
    assert worst(rows) == dict.fromkeys(BOUNDS, float("inf"))
    with poisoned():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
    assert torch.ones(2).isfinite().all()


def in_interpreter(program: str) -> Any:
    """What ``program`` prints as JSON, with Triton's interpreter."""
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=kernel.ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_interpreter_multiplies_fp32_as_the_hardware_does() -> None:
    """Three TF32 products are a thousand times better than one, and no better than fp32 itself."""
    one, three = in_interpreter(PRODUCTS)
    assert 1e-4 < one < 1e-3 and 1e-8 < three < 1e-6


def test_interpreter_rounds_bfloat16_as_the_hardware_does() -> None:
    assert in_interpreter(ROUNDED) == [0, 0]


ROUNDED = """
import torch
import triton
import triton.language as tl
from benchmarks.interpreter_rounding import round_to_nearest

@triton.jit
def convert(p_a, p_out, p_back, S: tl.constexpr):
    i = tl.arange(0, S)
    a = tl.load(p_a + i)
    tl.store(p_out + i, a.to(tl.bfloat16))
    tl.store(p_back + i, a.to(tl.bfloat16).to(tl.float32))

round_to_nearest()
a = torch.randn(1024) * torch.logspace(-30, 30, 1024)
a[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), -0.0])  # ties go to the even one
out, back = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024)
convert[(1,)](a, out, back, 1024)
wanted = a.bfloat16()
print([int((out != wanted).sum()), int((back != wanted.float()).sum())])
"""


PRODUCTS = """
import json
import torch
import triton
import triton.language as tl
from kernels.tiles import _tf32, dot

@triton.jit
def products(p_a, p_b, p_one, p_three, S: tl.constexpr):
    i = tl.arange(0, S)
    at = i[:, None] * S + i[None, :]
    a, b = tl.load(p_a + at), tl.load(p_b + at)
    tl.store(p_one + at, tl.dot(_tf32(a), _tf32(b)))
    tl.store(p_three + at, dot(a, b))

a, b = torch.randn(64, 64), torch.randn(64, 64)
one, three = torch.empty(64, 64), torch.empty(64, 64)
products[(1,)](a, b, one, three, 64)
exact = a.double() @ b.double()
print(json.dumps([float((found - exact).norm() / exact.norm()) for found in (one, three)]))
"""


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("folded", [True, False], ids=["folded", "heads"])
def test_no_tensor_repeats_the_image(direction: str, folded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With K expressions of one image nothing but the answer is K images large; kernels are left out."""
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    from kernels import launch

    monkeypatch.setattr(launch, "KERNELS", defaultdict(lambda: defaultdict(lambda: lambda *a, **k: None)))
    sizes = {}
    for count in (2, 16):
        case = Case(Problem(1, count, True, 5, 4096, 64, 4, 16, 4), direction, "fp32", False, folded)
        given = inputs(case, seed=3)
        with Allocations() as made:
            launch.run(*given.sides, given.weights, direction=direction, heads=4, eps=1e-5, plan=case.plan())
        *others, largest = sorted(made.sizes)
        if direction == IMAGE_TO_PROMPT:
            assert largest == count * 4096 * 64
            largest = others[-1]
        sizes[count] = largest
    assert sizes[16] < 16 * 4096 * 64 / 4 and sizes[16] - sizes[2] < 14 * 4096 * 64 / 8


class Allocations(TorchDispatchMode):
    """Notes how many elements each new tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.sizes.append(out.numel())
        return out


def test_wide_tokens_attend_in_smaller_tiles() -> None:
    """A tile of 64 tokens of 256 columns would spill registers, one of 32 not fit a block of sm_120."""
    found = [most_tokens(128, 2), most_tokens(256, 2), most_tokens(128, 4), most_tokens(16, 2)]
    assert found == [64, 16, 32, 64]
    widest = max(v.constants["BN"] for _, v in variants((SAM_LONG,)) if v.kernel == "attend_tokens")
    assert widest == 16


# --- the decoder


def test_shipped_segmenter_draws_the_same_masks_with_the_kernels() -> None:
    """In Triton's interpreter, on a scene of its own each time; masks of which the true ones are some."""
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    (row,) = interpreted(torch.seed() % 2**31, "kernel_masks", "--dtypes", "fp16")
    assert row["iou"] >= LEAST_IOU and row["objects"] > 0, row
    assert row["truth_iou"] > 0.3, row


@torch.no_grad()
def test_segmenter_is_the_same_with_the_op_and_without() -> None:
    torch.manual_seed(torch.seed() % 2**31)
    model = Segmenter(SMALL).eval()
    features = model.encode(torch.randn(1, 3, 64, 64))
    low = 0.5 * torch.rand(4, 2)
    boxes = torch.cat([low, low + 0.3], 1)
    text = torch.randn(4, 6, SMALL.text_dim)
    given = boxes, low + 0.15, torch.ones(4), text, torch.ones(4, 6, dtype=torch.bool)
    with using("off"):
        wanted = model.decode(features, *given)
    with using("op"):
        got = model.decode(features, *given)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_weights_keep_the_names_of_checkpoints() -> None:
    names = {name for name in Segmenter(SMALL).state_dict() if name.startswith("mask_decoder.layers.1.")}
    for part in ("prompt_to_image", "image_to_prompt"):
        for layer in ("q", "k", "v", "out"):
            assert {f"mask_decoder.layers.1.{part}.{layer}.{kind}" for kind in ("weight", "bias")} <= names
    assert "mask_decoder.layers.1.norms.3.weight" in names and not any("scale" in name for name in names)


def test_decoder_pass_starts_few_kernels() -> None:
    before, after = decoder_kernels("off"), decoder_kernels("op")
    assert before.ops == before.ours == 0 and after.ops == 9
    reads, writes = launches(SHIPPED, plan_read(SHIPPED)), launches(SHIPPED, plan_write(SHIPPED))
    # In each layer tokens attend, read the image and pass the MLP, and the image reads them; one last read.
    assert after.ours == 2 * (1 + reads + 1 + writes) + reads
    assert after.total <= 40 < before.total


def test_token_ops_equal_the_reference_and_have_its_gradients() -> None:
    given, _ = double_case(PROMPT_TO_IMAGE, masked=False)
    mlp = [torch.randn(*shape, dtype=torch.float64) for shape in ((64, 32), (64,), (32, 64), (32,))]
    leaves = [t.clone().requires_grad_() for t in (*given.sides[:2], *given.weights, *mlp)]
    # Attention among tokens has as many inner columns as the model is wide: here both are 32.
    x, position, weights, (w1, b1, w2, b2) = leaves[0], leaves[1], Weights(*leaves[2:12]), leaves[12:]
    found = {}
    for mode in ("off", "op"):
        with using(mode):
            attended = token_attention(x, position, weights, heads=2, eps=1e-5)
            mixed = token_mlp(attended, w1, b1, w2, b2, (weights.norm_weight, weights.norm_bias), eps=1e-5)
        change = torch.linspace(-1, 1, mixed.numel(), dtype=mixed.dtype).view_as(mixed)
        found[mode] = (attended.detach(), mixed.detach(), *torch.autograd.grad(mixed, leaves, change))
    for got, wanted in zip(found["op"], found["off"], strict=True):
        torch.testing.assert_close(got, wanted)


def test_benchmark_ends_with_one_json_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its slow parts, which other tests run, replaced; beyond a bound it fails and says so."""
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    errors = [{"case": name, "dtype": name, "error": 1e-7, "torch_error": 1e-7} for name in BOUNDS]
    found = {"kernel": "merge", "dim": 128, "capability": 90, "target": "sm_90a", "dtype": "fp16"}
    found |= {"registers": 90, "stack": 0, "local": 0, "shared": 4096, "tensor_core": 8}
    parts = {"kernel_cases": errors, "kernel_masks": [{"dtype": "fp16", "iou": 0.9995}]}
    monkeypatch.setattr(kernel, "interpreted", lambda seed, part="kernel_cases": parts[part])
    monkeypatch.setattr(kernel, "resources", lambda targets: [found])
    monkeypatch.setattr(kernel, "decoder_kernels", lambda mode: Count(30 if mode == "off" else 3, 4, 0, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel.main(["--seed", "5"]) == 0
    told = capsys.readouterr().out
    summary = json.loads(told.splitlines()[-1])
    assert summary["decoder_kernels_before"] == 34 and summary["decoder_kernels_after"] == 7
    assert summary["max_relative_error"] == dict.fromkeys(BOUNDS, 1e-7) and not summary["timed"]
    assert summary["compiled"]["sm_90"]["spilled"] == 0 and "not yet timed" in told
    assert summary["masks_iou"] == 0.9995
    parts["kernel_masks"][0]["iou"] = 0.99
    assert kernel.main(["--seed", "5"]) == 9
    assert "masks_iou" in capsys.readouterr().err
    errors[1]["error"] = 0.5
    assert kernel.main(["--seed", "5"]) == 9
    assert "off by more than its bound" in capsys.readouterr().err
