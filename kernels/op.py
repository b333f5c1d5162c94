"""The one op of prompt-feature attention: fused kernels on a GPU, plain torch everywhere else.

`prompt_feature_attention` is what models call. It chooses between `torch.ops.ppcr.prompt_feature_attention`,
which compilers and exporters see as one node, and the reference written out in standard operators:

    auto   (the default) the op on a CUDA device with Triton, in fp32, fp16 or bf16 without autocast, at
           widths the kernels have tiles for; else the reference
    op     always the op; on a CPU, and below compute capability 8.0, it computes the reference
    off    always the reference
    node   for export to ONNX: an attention without a mask is one node ``ppcr::PromptFeatureAttention``, whose
           meaning `export.attention_function` writes into the file; everything else is the reference

The environment variable PPCR_KERNELS sets the mode at start, `using` changes it for a while.

There is no backward kernel: gradients come from the reference, recomputed from the saved inputs.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kernels.plan import fits
from kernels.reference import DIRECTIONS, PROMPT_TO_IMAGE, Weights, attend_and_norm

VARIABLE = "PPCR_KERNELS"
MODES = ("auto", "op", "off", "node")
NODE = "ppcr::PromptFeatureAttention"
_CAPABILITY = (8, 0)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_mode = os.environ.get(VARIABLE, "auto")
if _mode not in MODES:
    raise ValueError(f"{VARIABLE}={_mode}: must be one of {', '.join(MODES)}")


@contextmanager
def using(mode: str) -> Iterator[None]:
    """Run the body in another mode; of the whole process, not of one thread.

    Raises:
        ValueError: no such mode.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"no kernel mode {mode!r}: must be one of {', '.join(MODES)}")
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def prompt_feature_attention(
    x: Tensor, x_position: Tensor, y: Tensor, y_position: Tensor, weights: Weights, *, direction: str,
    heads: int, eps: float = 1e-5, mask: Tensor | None = None, after: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """LayerNorm(x + attention of x over y) [+ after]; shapes and masks as in `attend_and_norm`.

    Raises:
        ValueError: a direction of another name.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"no direction {direction!r}: must be one of {', '.join(DIRECTIONS)}")
    widths = x.shape[-1], heads, weights.q_weight.shape[0] // heads
    if takes((x, x_position, y, y_position, *weights)) and (_mode == "op" or fits(*widths)):
        out: Tensor = _op(x, x_position, y, y_position, *weights, mask, after, direction, heads, eps)
        return out
    if _mode == "node" and mask is None:
        out = _as_node(x, x_position, y, y_position, weights, direction, heads, eps)
        return out if after is None else out + after
    given: dict[str, Any] = {"direction": direction, "heads": heads, "eps": eps, "mask": mask, "after": after}
    return attend_and_norm(x, x_position, y, y_position, weights, **given)


def _as_node(
    x: Tensor, x_position: Tensor, y: Tensor, y_position: Tensor, weights: Weights, direction: str,
    heads: int, eps: float,
) -> Tensor:  # fmt: skip
    """The node of an exported graph; its matrices are [in, out], as products of ONNX read them."""
    head_dim = weights.q_weight.shape[0] // heads
    attributes: dict[str, Any] = {
        "heads": heads,
        "scale": 1.0 / math.sqrt(head_dim),
        "eps": eps,
        "direction": direction,
    }
    return torch.onnx.ops.symbolic(
        NODE, (x, x_position, y, y_position, *(w.t() if w.dim() == 2 else w for w in weights)),
        attributes, dtype=x.dtype, shape=_shape_of(x, y, direction), version=1,
    )  # fmt: skip


def _shape_of(x: Tensor, y: Tensor, direction: str) -> tuple[int, ...]:
    tokens = x if direction == PROMPT_TO_IMAGE else y
    return tokens.shape[0], tokens.shape[1], x.shape[2], x.shape[3]


def takes(tensors: tuple[Tensor, ...]) -> bool:
    """Whether the mode, and in mode auto device and dtypes, send a call on `tensors` to an op."""
    if _mode != "auto":
        return _mode == "op"
    x = tensors[0]
    alike = x.dtype in _DTYPES and all(t.dtype == x.dtype for t in tensors)
    return x.is_cuda and _HAS_TRITON and alike and not torch.is_autocast_enabled("cuda")


def runs_on(x: Tensor) -> bool:
    """Whether the kernels run where `x` lies; asked inside the ops, which no compiler looks into."""
    return x.is_cuda and _HAS_TRITON and torch.cuda.get_device_capability(x.device) >= _CAPABILITY


@torch.library.custom_op("ppcr::prompt_feature_attention", mutates_args=())
def _op(
    x: Tensor, x_position: Tensor, y: Tensor, y_position: Tensor,
    q_weight: Tensor, q_bias: Tensor, k_weight: Tensor, k_bias: Tensor, v_weight: Tensor, v_bias: Tensor,
    out_weight: Tensor, out_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor,
    mask: Tensor | None, after: Tensor | None, direction: str, heads: int, eps: float,
) -> Tensor:  # fmt: skip
    weights = Weights(
        q_weight, q_bias, k_weight, k_bias, v_weight, v_bias, out_weight, out_bias, norm_weight, norm_bias
    )
    given: dict[str, Any] = {"direction": direction, "heads": heads, "eps": eps, "mask": mask, "after": after}
    if runs_on(x) and fits(x.shape[-1], heads, q_weight.shape[0] // heads):
        from kernels.launch import run

        return run(x, x_position, y, y_position, weights, **given)
    return attend_and_norm(x, x_position, y, y_position, weights, **given).contiguous()


@_op.register_fake
def _shape(x: Tensor, x_position: Tensor, y: Tensor, *others: Any) -> Tensor:
    direction = next(value for value in others if isinstance(value, str))
    return x.new_empty(_shape_of(x, y, direction))


_TENSORS = 14  # before mask, after, direction, heads and eps


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, mask, after = inputs[: _TENSORS + 2]
    ctx.save_for_backward(*tensors, mask)
    ctx.after_shape = None if after is None else after.shape
    ctx.settings = inputs[_TENSORS + 2 :]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """Of the reference: nothing of the forward pass is kept but its inputs."""
    *tensors, mask = ctx.saved_tensors
    direction, heads, eps = ctx.settings

    def forward(*given: Tensor) -> Tensor:
        x, x_position, y, y_position, *weights = given
        given_weights = Weights(*weights)
        settings: dict[str, Any] = {"direction": direction, "heads": heads, "eps": eps, "mask": mask}
        return attend_and_norm(x, x_position, y, y_position, given_weights, **settings)

    pull_back = torch.func.vjp(forward, *tensors)[1]
    after = None if ctx.after_shape is None else gradient.sum_to_size(ctx.after_shape)
    return (*pull_back(gradient), None, after, None, None, None)


_op.register_autograd(_backward, setup_context=_save)
