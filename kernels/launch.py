"""Runs the Triton kernels on tensors: layouts in, plan, launches, result out.

Importing this module imports Triton. On a CPU the kernels run only under Triton's interpreter
(TRITON_INTERPRET=1 before the import).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.library import KERNELS
from kernels.plan import Problem, ReadPlan, WritePlan, plan_read, plan_write
from kernels.reference import PROMPT_TO_IMAGE, Weights
from kernels.schedule import Layout, Schedule, read_schedule, write_schedule


def run(
    x: Tensor, x_position: Tensor, y: Tensor, y_position: Tensor, weights: Weights, *, direction: str,
    heads: int, eps: float, mask: Tensor | None = None, after: Tensor | None = None,
    plan: ReadPlan | WritePlan | None = None,
) -> Tensor:  # fmt: skip
    """`kernels.reference.attend_and_norm` on the kernels; `plan` overrules the one chosen for the problem."""
    weights = Weights(*(w.contiguous() for w in weights))
    if direction == PROMPT_TO_IMAGE:
        problem = problem_of(x, y, heads, weights)
        chosen = plan_read(problem, _processors(x)) if plan is None else plan
        assert isinstance(chosen, ReadPlan)
        return _read(x, x_position, y, y_position, weights, problem, chosen, eps, mask, after)
    problem = problem_of(y, x, heads, weights)
    chosen_write = plan_write(problem) if plan is None else plan
    assert isinstance(chosen_write, WritePlan)
    return _write(x, x_position, y, y_position, weights, problem, chosen_write, eps, mask, after)


def problem_of(tokens: Tensor, image: Tensor, heads: int, weights: Weights) -> Problem:
    """The sizes of tokens f[B, K, N, C] and image f[B, K or 1, M, C]."""
    b, k, n, c = tokens.shape
    inner = weights.q_weight.shape[0]
    return Problem(
        images=b, prompts=k, shared=image.shape[1] == 1, tokens=n, cells=image.shape[2], dim=c, heads=heads,
        head_dim=inner // heads, itemsize=tokens.element_size(),
    )  # fmt: skip


def _read(
    x: Tensor, x_position: Tensor, y: Tensor, y_position: Tensor, w: Weights, p: Problem, plan: ReadPlan,
    eps: float, mask: Tensor | None, after: Tensor | None,
) -> Tensor:  # fmt: skip
    given = _operands(x, x_position, y, y_position, w, mask, after)
    given["out"] = torch.empty_like(given["tokens"])
    if not plan.folded:
        given["q"] = F.linear(given["tokens"] + x_position, w.q_weight, w.q_bias).contiguous()
        given["k"] = F.linear(given["image"] + given["image_position"], w.k_weight).contiguous()
        given["v"] = F.linear(given["image"], w.v_weight).contiguous()
    return _launch(read_schedule(p, plan, _layout(p, given), eps), given)


def _write(
    x: Tensor, x_position: Tensor, y: Tensor, y_position: Tensor, w: Weights, p: Problem, plan: WritePlan,
    eps: float, mask: Tensor | None, after: Tensor | None,
) -> Tensor:  # fmt: skip
    given = _operands(y, y_position, x, x_position, w, mask, after)
    given["out"] = torch.empty(p.images, p.prompts, p.cells, p.dim, dtype=x.dtype, device=x.device)
    if not plan.folded:
        given["k"] = F.linear(given["tokens"] + y_position, w.k_weight, w.k_bias).contiguous()
        given["v"] = F.linear(given["tokens"], w.v_weight, w.v_bias).contiguous()
    return _launch(write_schedule(p, plan, _layout(p, given), eps), given)


def _operands(
    tokens: Tensor, token_position: Tensor, image: Tensor, image_position: Tensor, w: Weights,
    mask: Tensor | None, after: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of a schedule by name, dense in memory."""
    tokens, image = tokens.contiguous(), image.contiguous()
    given = {"tokens": tokens, "token_position": _position(token_position, tokens)}
    given |= {"image": image, "image_position": _position(image_position, image), **w._asdict()}
    if mask is not None:
        given["mask"] = mask.contiguous().view(torch.uint8)
    if after is not None:
        given["after"] = after.contiguous()
    return given


def _layout(p: Problem, given: dict[str, Tensor]) -> Layout:
    return Layout(
        expressions=p.expressions, group=p.group, features=p.features,
        common_tokens=_is_common(given["token_position"]), common_cells=_is_common(given["image_position"]),
        masked="mask" in given, after="after" in given,
    )  # fmt: skip


def _launch(schedule: Schedule, given: dict[str, Tensor]) -> Tensor:
    """Run the steps on the named tensors; workspaces are made here. Returns "out"."""
    out = given["out"]
    for name, space in schedule.workspaces.items():
        dtype = torch.float32 if space.wide else out.dtype
        given[name] = torch.empty(space.shape, dtype=dtype, device=out.device)  # type: ignore[arg-type]
    for step in schedule.steps:
        arguments = (given[value] if isinstance(value, str) else value for value in step.arguments)
        KERNELS[step.variant.kernel][step.grid](*arguments, **step.variant.options)
    return out


def _position(position: Tensor, x: Tensor) -> Tensor:
    """f[N, C] for all of `x`, or one for each of its leading dimensions that lies in memory."""
    return position.contiguous() if _is_common(position) else position.expand_as(x).contiguous()


def _is_common(position: Tensor) -> bool:
    return position.numel() == position.shape[-1] * position.shape[-2]


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8
