"""The segmenter as two graphs: the image encoder, and the mask decoder for any number of prompts.

Image encoder: ``pixels`` f32[B, 3, S, S] -> ``image_features`` and, in families that have them,
``high_res_0`` and ``high_res_1``.
Mask decoder: those of one image, ``boxes`` f32[N, 4], ``points`` f32[N, 2], ``spatial_valid`` f32[N],
``text_embeddings`` f32[N, T, E], ``text_mask`` bool[N, T] -> ``mask_logits`` f32[N, M, M] and
``scores`` f32[N].
B, N and T are dynamic; the image's features are shared by all prompts.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export.absorbed import absorbed
from export.attention_function import add_function
from kernels.op import using
from ppcr.manifest import DATA
from ppcr.model.sam import SamSegmenter
from ppcr.model.segmenters import AnyFeatures, AnySegmenter

OPSET = 20
FEATURES = ("image_features", "high_res_0", "high_res_1")
"""What a family with finer features keeps of an image; the others keep the first alone."""
PROMPTS = ("boxes", "points", "spatial_valid", "text_embeddings", "text_mask")
OUTPUTS = ("mask_logits", "scores")
LARGEST = 1_900_000_000
"""Bytes of weights from which on they lie in a file of their own: SAM's largest encoder."""


class _Encode(nn.Module):
    """The image encoder with a plain tuple for an answer."""

    def __init__(self, segmenter: AnySegmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.segmenter.encode(pixels))


class _Decode(nn.Module):
    """The decoder with each of its features, then each of its prompts, as an argument."""

    def __init__(self, segmenter: AnySegmenter, kind: type[AnyFeatures]) -> None:
        super().__init__()
        self.segmenter, self.kind = segmenter, kind

    def forward(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        count = len(self.kind._fields)
        features = self.kind(*arguments[:count])
        return self.segmenter.decode(features, *arguments[count:])  # type: ignore[arg-type]


def write_image_encoder(segmenter: AnySegmenter, path: Path) -> None:
    """Export the image encoder of a segmenter in evaluation mode."""
    side = segmenter.config.image_size
    b = torch.export.Dim("B", min=1, max=64)
    # Two images: tracing would take a batch of one for a constant.
    pixels = torch.zeros(2, 3, side, side)
    _export(_Encode(segmenter), (pixels,), path, ("pixels",), segmenter.features._fields, ({0: b},))


def write_mask_decoder(segmenter: AnySegmenter, path: Path) -> None:
    """Export the prompt encoder and mask decoder of a segmenter in evaluation mode."""
    config = segmenter.config
    side = config.image_size
    with torch.no_grad():
        features = segmenter.encode(torch.zeros(1, 3, side, side))
    count, length = 3, 11  # neither 0 nor 1, which tracing would take for constants
    prompts = (
        torch.rand(count, 4), torch.rand(count, 2), torch.ones(count),
        torch.randn(count, length, config.text_dim), torch.ones(count, length, dtype=torch.bool),
    )  # fmt: skip
    n = torch.export.Dim("N", min=1, max=1024)
    t = torch.export.Dim("T", min=1, max=config.max_text)
    shapes = (*[None] * len(features), {0: n}, {0: n}, {0: n}, {0: n, 1: t}, {0: n, 1: t})
    names = (*features._fields, *PROMPTS)
    form = absorbed(segmenter) if isinstance(segmenter, SamSegmenter) else segmenter
    # The shapes of `*arguments` are one tuple.
    _export(_Decode(form, type(features)), (*features, *prompts), path, names, OUTPUTS, (shapes,))


def _export(
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    shapes: tuple[Any, ...] | None = None,
) -> None:
    # Standard operators, and one node for each prompt-feature attention, wherever the segmenter lies.
    with _quiet(), torch.no_grad(), using("node"):
        program = torch.onnx.export(
            module.eval(),
            arguments,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _forget_sources(model)
    _name_weights(model, module)
    add_function(model)
    _save(model, path)


def _save(model: onnx.ModelProto, path: Path) -> None:
    """Write ``model``, and weights of more than a protobuf can hold into a file beside it."""
    if sum(constant.ByteSize() for constant in model.graph.initializer) < LARGEST:
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return
    beside = f"{path.name}{DATA}"
    onnx.save(model, path, save_as_external_data=True, location=beside, all_tensors_to_one_file=True)
    onnx.checker.check_model(str(path))


def _forget_sources(model: onnx.ModelProto) -> None:
    # The exporter notes for each node where its Python source lies: useless in a bundle, different on each
    # machine, and larger than the small weights.
    del model.metadata_props[:]
    for graph in (model.graph, *model.functions):
        del graph.metadata_props[:]
        for node in graph.node:
            del node.metadata_props[:]
            node.ClearField("doc_string")
        for value in (*getattr(graph, "value_info", ()), *getattr(graph, "initializer", ())):
            del value.metadata_props[:]
            value.ClearField("doc_string")


def _name_weights(model: onnx.ModelProto, module: nn.Module) -> None:
    # The exporter transposes the matrices of products and numbers them; by name they can be told apart again.
    names = {}
    for name, parameter in module.named_parameters():
        value = parameter.detach().cpu().numpy()
        if value.ndim == 2:
            names[value.T.shape, _digest(value.T)] = name.removeprefix("segmenter.")
    new = {}
    for constant in model.graph.initializer:
        value = numpy_helper.to_array(constant)
        known = names.get((value.shape, _digest(value))) if value.ndim == 2 else None
        if known:
            new[constant.name] = known
            constant.name = known
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = new.get(name, name)


def _digest(value: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(value).data).digest()


@contextmanager
def _quiet() -> Iterator[None]:
    # The exporter tells of its own deprecations and missing optional packages on every call.
    names = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
