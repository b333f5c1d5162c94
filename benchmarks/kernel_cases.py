"""The kernels against a float64 reference, on fresh random inputs: on a GPU, or in Triton's interpreter.

``TRITON_INTERPRET=1 python -m benchmarks.kernel_cases --seed 7`` runs every case on the CPU and prints one
JSON object for each. Inputs are of unit scale; padded tokens hold NaN, and whatever the kernels' outputs and
workspaces held before is NaN too, so that nothing unwritten or unwanted can pass.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.interpreter_rounding import round_to_nearest
from kernels.op import using
from kernels.plan import Problem, ReadPlan, WritePlan, plan_read, plan_write
from kernels.reference import DIRECTIONS, PROMPT_TO_IMAGE, Weights, attend_and_norm

BOUNDS = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}
"""Most relative error, norm of the difference over norm of the reference, by dtype."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOKEN_STEPS = ("token_attention", "token_mlp")
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Case:
    """One problem in one direction and dtype. masked: ragged tokens, the first expression without any."""

    problem: Problem
    direction: str
    dtype: str
    masked: bool
    folded: bool

    @property
    def name(self) -> str:
        p = self.problem
        shape = f"{p.images}x{p.prompts}x{p.tokens}-{p.cells}-{p.dim}-{p.heads}x{p.head_dim}"
        notes = ("-shared" if p.shared else "") + ("-ragged" if self.masked else "")
        return f"{self.direction}-{self.dtype}-{shape}{notes}-{'folded' if self.folded else 'heads'}"

    def plan(self, processors: int = 132) -> ReadPlan | WritePlan:
        """The plan the op would take, on this case's way of the two."""
        if self.direction == PROMPT_TO_IMAGE:
            return plan_read(self.problem, processors, folded=self.folded)
        return plan_write(self.problem, folded=self.folded)


def cases(dtypes: Sequence[str] = tuple(DTYPES)) -> list[Case]:
    """Odd lengths, each head_dim, one and several images and expressions, shared and own features, ragged."""
    made = []
    for dtype in dtypes:
        sizes = {"itemsize": ITEMSIZE[dtype]}
        shipped = Problem(1, 1, True, 13, 300, 128, 4, 16, **sizes)
        ragged = Problem(1, 3, True, 7, 257, 64, 2, 32, **sizes)
        own = Problem(2, 2, False, 21, 130, 64, 4, 16, **sizes)
        many = Problem(1, 2, True, 70, 100, 64, 1, 64, **sizes)
        wide = Problem(1, 1, True, 13, 66, 256, 8, 16, **sizes)
        single = Problem(1, 1, True, 1, 17, 64, 1, 64, **sizes)
        for direction in DIRECTIONS:
            made += [
                Case(shipped, direction, dtype, False, True),
                Case(shipped, direction, dtype, False, False),
                Case(ragged, direction, dtype, True, True),
                Case(own, direction, dtype, True, False),
                Case(many, direction, dtype, True, False),
                Case(wide, direction, dtype, False, True),
                Case(single, direction, dtype, False, True),
            ]
    return made


@dataclass(frozen=True)
class Inputs:
    """Of one call: x, x_position, y, y_position; weights; mask, after; the padded tokens hold NaN."""

    sides: tuple[Tensor, Tensor, Tensor, Tensor]
    weights: Weights
    mask: Tensor | None
    after: Tensor | None

    def to(self, **how: Any) -> Inputs:
        return Inputs(
            tuple(t.to(**how) for t in self.sides),  # type: ignore[arg-type]
            Weights(*(t.to(**how) for t in self.weights)),
            None if self.mask is None else self.mask.to(self.sides[0].device),
            None if self.after is None else self.after.to(**how),
        )


def inputs(case: Case, seed: int, device: str = "cpu") -> Inputs:
    """Fresh inputs, in the case's dtype."""
    g, p = torch.Generator().manual_seed(seed), case.problem

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=g)).to(device, DTYPES[case.dtype])

    projections: list[Tensor] = []
    for rows, columns in ((p.inner, p.dim), (p.inner, p.dim), (p.inner, p.dim), (p.dim, p.inner)):
        projections += [random(rows, columns, scale=columns**-0.5), random(rows, scale=0.3)]
    projections += [1.0 + random(p.dim, scale=0.2), random(p.dim, scale=0.3)]  # the norm
    weights = Weights(*projections)
    tokens = [random(p.images, p.prompts, p.tokens, p.dim) for _ in range(2)]
    image = [random(p.images, 1 if p.shared else p.prompts, p.cells, p.dim), random(p.cells, p.dim)]
    mask = None
    if case.masked:
        mask = (torch.rand(p.images, p.prompts, p.tokens, generator=g) < 0.7).to(device)
        mask[0, 0] = False
        tokens = [torch.where(mask[..., None], t, torch.full_like(t, float("nan"))) for t in tokens]
    to_image = case.direction == PROMPT_TO_IMAGE
    after = None if to_image else random(p.images, p.prompts, p.cells, p.dim)
    sides = (*tokens, *image) if to_image else (*image, *tokens)
    return Inputs(sides, weights, mask, after)  # type: ignore[arg-type]


def check(case: Case, seed: int, device: str = "cpu") -> dict[str, Any]:
    """Run one case: ``error`` of the kernels, ``torch_error`` of plain torch in the same dtype, ``matters``.

    ``matters`` is the error an answer without any attention would have: a case in which it is small proves
    nothing. An error of NaN means that something unwritten or padded was read.
    """
    from kernels.launch import run

    given = inputs(case, seed, device)
    exact = given.to(dtype=torch.float64)
    settings: dict[str, Any] = {"direction": case.direction, "heads": case.problem.heads, "eps": 1e-5}

    def reference(of: Inputs) -> Tensor:
        return attend_and_norm(*of.sides, of.weights, **settings, mask=of.mask, after=of.after)  # type: ignore[arg-type]

    truth = reference(exact)
    silent = exact.weights._replace(
        out_weight=torch.zeros_like(exact.weights.out_weight),
        out_bias=torch.zeros_like(exact.weights.out_bias),
    )
    with poisoned():
        out = run(
            *given.sides, given.weights, **settings, mask=given.mask, after=given.after, plan=case.plan()
        )  # type: ignore[arg-type]
    return {
        "case": case.name,
        "dtype": case.dtype,
        "error": _relative(out, truth),
        "torch_error": _relative(reference(given), truth),
        "matters": _relative(reference(replace(exact, weights=silent)), truth),
    }


def check_tokens(dtype: str, seed: int, device: str = "cpu") -> list[dict[str, Any]]:
    """The tokens' own steps, like `check`: attention among 13 tokens of 3 expressions, and the MLP."""
    from kernels.token_op import attend_on_kernel, mlp_on_kernel, token_attention, token_mlp

    case = Case(Problem(1, 3, True, 13, 16, 64, 4, 16, ITEMSIZE[dtype]), PROMPT_TO_IMAGE, dtype, False, False)
    given = inputs(case, seed, device)
    exact = given.to(dtype=torch.float64)
    g, c, wide, eps = torch.Generator().manual_seed(seed + 1), 64, 128, 1e-5
    shapes = (wide, c), (wide,), (c, wide), (c,)
    mlp = tuple((torch.randn(*s, generator=g) * s[-1] ** -0.5).to(device, DTYPES[dtype]) for s in shapes)
    rows = []
    with poisoned():
        attended = attend_on_kernel(*given.sides[:2], given.weights, 4, eps)
        w1, b1, w2, b2, gamma, beta = *mlp, given.weights.norm_weight, given.weights.norm_bias
        mixed = mlp_on_kernel(given.sides[0], w1, b1, w2, b2, gamma, beta, eps)

    def steps(of: Inputs, layers: Sequence[Tensor], silent: float = 1.0) -> tuple[Tensor, Tensor]:
        w = of.weights._replace(out_weight=silent * of.weights.out_weight)
        norm = w.norm_weight, w.norm_bias
        w1, b1, w2, b2 = layers
        return (
            token_attention(*of.sides[:2], w, heads=4, eps=eps),
            token_mlp(of.sides[0], w1, b1, silent * w2, b2, norm, eps=eps),
        )

    with using("off"):
        truths = steps(exact, [t.double() for t in mlp])
        plain = steps(given, mlp)
        without = steps(exact, [t.double() for t in mlp], silent=0.0)
    for name, out, truth, same, none in zip(
        TOKEN_STEPS, (attended, mixed), truths, plain, without, strict=True
    ):
        errors = {"error": _relative(out, truth), "torch_error": _relative(same, truth)}
        rows.append({"case": f"{name}-{dtype}", "dtype": dtype, **errors, "matters": _relative(none, truth)})
    return rows


def _relative(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).norm() / truth.norm())


def check_all(seed: int, device: str = "cpu") -> Iterator[dict[str, Any]]:
    """Every case and the tokens' own steps, in each dtype."""
    for index, case in enumerate(cases()):
        yield check(case, seed + index, device)
    for dtype in DTYPES:
        yield from check_tokens(dtype, seed, device)


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it, uninitialised memory is NaN."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(made: Tensor) -> Tensor:
        return made.fill_(float("nan")) if made.is_floating_point() else made

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: poison(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k))),
    ):
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Print one JSON object for each case; 1 when one is not within its bound."""
    parser = argparse.ArgumentParser(description="The kernels against a float64 reference.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    round_to_nearest()
    good = True
    for row in check_all(arguments.seed, arguments.device):
        good = good and row["error"] <= BOUNDS[row["dtype"]]
        print(json.dumps(row), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
