"""The same two-way attention by other means: torch's own attention backends, its compiler, FlexAttention.

Each but the reference is given its best form: expressions that share an image lie along the queries, so that
shared keys are never repeated. Projections, residual and norm are plain torch, which torch's compiler fuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.reference import IMAGE_TO_PROMPT, PROMPT_TO_IMAGE, Weights

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[..., Tensor]
"""x, x_position, y, y_position, weights and the keywords direction and heads -> the closed block."""

BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}


def block(attention: Attention) -> Step:
    """A step of the two-way layer around `attention` of q, k, v f[batch, H, length, D]."""

    def step(
        x: Tensor,
        x_position: Tensor,
        y: Tensor,
        y_position: Tensor,
        w: Weights,
        *,
        direction: str,
        heads: int,
    ) -> Tensor:
        q = _heads(F.linear(x + x_position, w.q_weight, w.q_bias), heads)
        k = _heads(F.linear(y + y_position, w.k_weight, w.k_bias), heads)
        v = _heads(F.linear(y, w.v_weight, w.v_bias), heads)
        if direction == PROMPT_TO_IMAGE and k.shape[1] < q.shape[1]:
            b, e, h, n, d = q.shape
            along = q.transpose(1, 2).reshape(b, h, e * n, d)
            read = attention(along, k.squeeze(1), v.squeeze(1)).unflatten(2, (e, n)).transpose(1, 2)
        else:
            b, e = x.shape[0], max(x.shape[1], y.shape[1])
            q, k, v = (t.expand(b, e, *t.shape[2:]).flatten(0, 1) for t in (q, k, v))
            read = attention(q, k, v).unflatten(0, (b, e))
        read = F.linear(read.transpose(-2, -3).flatten(-2), w.out_weight, w.out_bias)
        return F.layer_norm(x + read, w.norm_weight.shape, w.norm_weight, w.norm_bias)

    return step


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def two_way(step: Step, sides: tuple[Tensor, ...], read: Weights, write: Weights, heads: int) -> Tensor:
    """Tokens read the image, then the image reads the new tokens -> image f[B, K, M, C]."""
    tokens, token_position, image, cell_position = sides
    tokens = step(tokens, token_position, image, cell_position, read, direction=PROMPT_TO_IMAGE, heads=heads)
    return step(image, cell_position, tokens, token_position, write, direction=IMAGE_TO_PROMPT, heads=heads)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention written out."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


def rivals() -> dict[str, Step]:
    """Name -> step; the names that begin with sdpa_ are torch's own attention, one backend each, those with
    compiled_ went through torch's compiler: the reference as it is written, and the blocks of this file."""
    from torch.nn.attention.flex_attention import flex_attention

    from kernels.reference import attend_and_norm

    made: dict[str, Step] = {}
    for name, backend in BACKENDS.items():

        def attend(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        made[name] = block(attend)

    def written_out(*sides: Any, direction: str, heads: int) -> Tensor:
        x, x_position, y, y_position, weights = sides
        return attend_and_norm(
            x, x_position, y, y_position, weights, direction=direction, heads=heads, eps=1e-5
        )  # type: ignore[arg-type]

    forms = {
        "compiled_reference": written_out,
        "compiled_plain": block(plain),
        "compiled_sdpa": block(F.scaled_dot_product_attention),
        "compiled_flex": block(flex_attention),  # without the compiler it would not be fused
    }
    return made | {name: torch.compile(form, dynamic=False) for name, form in forms.items()}
