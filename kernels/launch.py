"""Runs the Triton kernels on tensors: layouts in, plan, launches, result out.

Importing this module imports Triton. On a CPU the kernels run only under Triton's interpreter
(TRITON_INTERPRET=1 before the import).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.fold import fold_tokens
from kernels.image_to_prompt import write_folded, write_heads
from kernels.plan import (
    TOKEN_BLOCK,
    Problem,
    ReadPlan,
    Variant,
    WritePlan,
    ceil,
    plan_read,
    plan_write,
    read_variants,
    write_variants,
)
from kernels.prompt_to_image import merge, read_folded, read_heads
from kernels.reference import PROMPT_TO_IMAGE, Weights

_LOG2_E = math.log2(math.e)


def run(
    x: Tensor,
    x_position: Tensor,
    y: Tensor,
    y_position: Tensor,
    weights: Weights,
    *,
    direction: str,
    heads: int,
    eps: float,
    mask: Tensor | None = None,
    after: Tensor | None = None,
    plan: ReadPlan | WritePlan | None = None,
) -> Tensor:
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
    tokens, image, keep = x.contiguous(), y.contiguous(), _bytes(mask)
    place = _image_position(y_position, image)
    e, n, m, device = p.expressions, p.tokens, p.cells, x.device
    part = torch.empty(e, plan.splits, n, p.inner, dtype=torch.float32, device=device)
    lse = torch.empty(e, plan.splits, n, p.heads, dtype=torch.float32, device=device)
    scale = _LOG2_E / math.sqrt(p.head_dim)
    row_blocks, token_blocks = ceil(plan.rows, plan.block_rows), ceil(n, TOKEN_BLOCK)
    variants = read_variants(p, plan, mask=mask is not None, after=after is not None)
    if plan.folded:
        folded = torch.empty(e, p.heads, n, p.dim, dtype=x.dtype, device=device)
        position, stride = _token_position(x_position, tokens)
        fold_tokens[(p.heads, token_blocks, e)](
            tokens, position, keep, w.q_weight, w.q_bias, w.k_weight, None, None, None, None, folded, None,
            None, n, scale, stride, **_options(variants["fold"]),
        )  # fmt: skip
        read_folded[(row_blocks, plan.splits, p.features)](
            folded, image, place, w.v_weight, part, lse, plan.rows, n, m, plan.splits, p.group,
            0 if _is_common(place) else m * p.dim, **_options(variants["read"]),
        )  # fmt: skip
    else:
        q = F.linear(tokens + x_position, w.q_weight, w.q_bias).contiguous()
        k = F.linear(image + place, w.k_weight).contiguous()
        v = F.linear(image, w.v_weight).contiguous()
        read_heads[(row_blocks, plan.splits, p.features * p.heads)](
            q, k, v, part, lse, plan.rows, n, m, scale, plan.splits, p.group,
            **_options(variants["read"]),
        )  # fmt: skip
    out = torch.empty_like(tokens)
    merge[(token_blocks, e)](
        part, lse, w.v_bias, w.out_weight, w.out_bias, tokens, w.norm_weight, w.norm_bias, keep,
        _contiguous(after), out, n, eps, **_options(variants["merge"]),
    )  # fmt: skip
    return out


def _write(
    x: Tensor, x_position: Tensor, y: Tensor, y_position: Tensor, w: Weights, p: Problem, plan: WritePlan,
    eps: float, mask: Tensor | None, after: Tensor | None,
) -> Tensor:  # fmt: skip
    image, tokens, keep = x.contiguous(), y.contiguous(), _bytes(mask)
    place = _image_position(x_position, image)
    e, n, m, device = p.expressions, p.tokens, p.cells, x.device
    out = torch.empty(p.images, p.prompts, m, p.dim, dtype=x.dtype, device=device)
    scale = _LOG2_E / math.sqrt(p.head_dim)
    groups = p.group, e if _is_common(place) else p.group
    grid = ceil(m, plan.block_cells), e
    close = w.out_bias, w.norm_weight, w.norm_bias, _contiguous(after), out
    variants = write_variants(p, plan, mask=mask is not None, after=after is not None)
    if plan.folded:
        folded, value = (torch.empty(e, p.heads, n, p.dim, dtype=x.dtype, device=device) for _ in range(2))
        bias = torch.empty(e, p.heads, n, dtype=torch.float32, device=device)
        position, stride = _token_position(y_position, tokens)
        fold_tokens[(p.heads, ceil(n, TOKEN_BLOCK), e)](
            tokens, position, keep, w.k_weight, w.k_bias, w.q_weight, w.q_bias, w.v_weight, w.v_bias,
            w.out_weight, folded, bias, value, n, scale, stride, **_options(variants["fold"]),
        )  # fmt: skip
        write_folded[grid](
            image, place, folded, bias, value, *close, n, m, eps, *groups, **_options(variants["write"])
        )
    else:
        k = F.linear(tokens + y_position, w.k_weight, w.k_bias).contiguous()
        v = F.linear(tokens, w.v_weight, w.v_bias).contiguous()
        write_heads[grid](
            image, place, w.q_weight, w.q_bias, k, v, keep, w.out_weight, *close, n, m, scale, eps, *groups,
            **_options(variants["write"]),
        )  # fmt: skip
    return out


def _options(variant: Variant) -> dict[str, Any]:
    return {**variant.constants, "num_warps": variant.warps, "num_stages": variant.stages}


def _token_position(position: Tensor, tokens: Tensor) -> tuple[Tensor, int]:
    """The tokens' positions, and how far apart those of two expressions lie (0: the same for all)."""
    if _is_common(position):
        return position.contiguous(), 0
    return position.expand_as(tokens).contiguous(), tokens.shape[-2] * tokens.shape[-1]


def _image_position(position: Tensor, image: Tensor) -> Tensor:
    """The cells' positions: f[M, C] for all images, or one for each image that lies in memory."""
    return position.contiguous() if _is_common(position) else position.expand_as(image).contiguous()


def _is_common(position: Tensor) -> bool:
    return position.numel() == position.shape[-1] * position.shape[-2]


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8
