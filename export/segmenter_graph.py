"""The segmenter as two graphs: the image encoder, and the mask decoder for any number of prompts.

Image encoder: ``pixels`` f32[1, 3, S, S] -> ``image_features``, ``high_res_0``, ``high_res_1``.
Mask decoder: those three, ``boxes`` f32[N, 4], ``points`` f32[N, 2], ``spatial_valid`` f32[N],
``text_embeddings`` f32[N, T, E], ``text_mask`` bool[N, T] -> ``mask_logits`` f32[N, S/2, S/2] and
``scores`` f32[N].
N and T are dynamic; the image's features are shared by all prompts.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from kernels.op import using
from ppcr.model.image_encoder import ImageFeatures
from ppcr.model.segmenter import Segmenter

OPSET = 20
FEATURES = ("image_features", "high_res_0", "high_res_1")
PROMPTS = ("boxes", "points", "spatial_valid", "text_embeddings", "text_mask")
OUTPUTS = ("mask_logits", "scores")


class _Encode(nn.Module):
    """The image encoder with a plain tuple for an answer."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.segmenter.encode(pixels)
        return features.image_features, features.high_res_0, features.high_res_1


class _Decode(nn.Module):
    """The decoder with its features as separate arguments."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(
        self,
        image_features: Tensor,
        high_res_0: Tensor,
        high_res_1: Tensor,
        boxes: Tensor,
        points: Tensor,
        spatial_valid: Tensor,
        text_embeddings: Tensor,
        text_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        features = ImageFeatures(image_features, high_res_0, high_res_1)
        return self.segmenter.decode(features, boxes, points, spatial_valid, text_embeddings, text_mask)


def write_image_encoder(segmenter: Segmenter, path: Path) -> None:
    """Export the image encoder of a segmenter in evaluation mode."""
    side = segmenter.config.image_size
    _export(_Encode(segmenter), (torch.zeros(1, 3, side, side),), path, ("pixels",), FEATURES)


def write_mask_decoder(segmenter: Segmenter, path: Path) -> None:
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
    shapes = (None, None, None, {0: n}, {0: n}, {0: n}, {0: n, 1: t}, {0: n, 1: t})
    _export(_Decode(segmenter), (*features, *prompts), path, (*FEATURES, *PROMPTS), OUTPUTS, shapes)


def _export(
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    path: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    shapes: tuple[Any, ...] | None = None,
) -> None:
    # Standard operators alone, wherever the segmenter lies.
    with _quiet(), torch.no_grad(), using("off"):
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
    onnx.checker.check_model(model)
    onnx.save(model, path)


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
            names[value.T.shape, value.T.tobytes()] = name.removeprefix("segmenter.")
    new = {}
    for constant in model.graph.initializer:
        value = numpy_helper.to_array(constant)
        known = names.get((value.shape, value.tobytes())) if value.ndim == 2 else None
        if known:
            new[constant.name] = known
            constant.name = known
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = new.get(name, name)


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
