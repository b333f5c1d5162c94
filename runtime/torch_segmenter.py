"""The segmenter in torch, on a GPU on a stream of its own; a part of `runtime.torch_session`."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ppcr.model.prompt_encoder import Prompts as TensorPrompts
from ppcr.model.segmenters import AnyFeatures, AnySegmenter
from runtime.session import Float32Array, Prompts
from runtime.torch_device import at_work
from runtime.torch_graph import Recorded, record

MASK_PIXELS = 1 << 22
"""Pixels of mask logits drawn at once: 64 masks of SAM's."""


class TorchSegmenter:
    """`runtime.session.SegmenterSession`. Threads may share it; their images are encoded one after the other.

    Boxes, points and text are read in float32 always: a half-precision corner would be pixels off. On a GPU
    it works on a stream of its own, beside the decoding steps, and the image encoder is one CUDA graph: its
    hundreds of launches would take the processor from these steps.
    """

    def __init__(self, segmenter: AnySegmenter, dtype: torch.dtype) -> None:
        self._segmenter, self._dtype = segmenter.eval(), dtype
        for part in (segmenter.image_encoder, segmenter.mask_decoder):
            part.to(dtype)
        self._device = next(segmenter.parameters()).device
        on_gpu, side = self._device.type == "cuda", segmenter.config.image_size
        self._pixels = torch.zeros(1, 3, side, side, dtype=dtype, device=self._device)
        # Page-locked: the GPU copies from it without the processor.
        self._staged = torch.zeros(1, 3, side, side, pin_memory=on_gpu)
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        self._recorded: Recorded[AnyFeatures] | None = None
        if on_gpu:
            self._recorded = record(self._see, "the image encoder")
            self._stream = torch.cuda.Stream()
            # Not before the weights are there, in their type.
            self._stream.wait_stream(torch.cuda.current_stream())
        self._most = max(1, MASK_PIXELS // segmenter.config.mask_size**2)

    @at_work
    def encode(self, pixels: Float32Array) -> AnyFeatures:
        """Pixels f32 [3, H, W] to the features of one image on the device."""
        with self._lock, self._at_work():
            self._staged[0].copy_(torch.from_numpy(pixels))
            self._pixels.copy_(self._staged, non_blocking=True)
            if self._recorded is None:
                features = self._see()
            else:
                seen = self._recorded.replay()
                # The next image is written over these.
                features = type(seen)(*(part.clone() for part in seen))
            self._wait()
        return features

    def _see(self) -> AnyFeatures:
        features: AnyFeatures = self._segmenter.encode(self._pixels)
        return features

    @at_work
    def decode(self, features: AnyFeatures, prompts: Prompts) -> tuple[Float32Array, Float32Array]:
        """Mask logits f32 [N, h, w] and scores f32 [N]."""
        parts = []
        with self._at_work():
            for first in range(0, len(prompts.boxes), self._most):
                rows = slice(first, first + self._most)
                given = (self._tensor(part[rows]) for part in vars(prompts).values())
                logits, scores = self._draw(features, TensorPrompts(*given))
                parts.append((logits.float().cpu().numpy(), scores.float().cpu().numpy()))
        masks, all_scores = zip(*parts, strict=True)
        return np.concatenate(masks), np.concatenate(all_scores)

    def _draw(self, features: AnyFeatures, prompts: TensorPrompts) -> tuple[Tensor, Tensor]:
        """As the segmenter's own `decode_batch`, with what it read of the prompts brought to one type."""
        encoder: Any = self._segmenter.prompt_encoder
        encoded = encoder(prompts)
        encoded = type(encoded)(*(part.to(self._dtype) for part in encoded))
        positions = encoder.cell_positions.to(self._dtype)
        masks, scores = self._segmenter.mask_decoder(features, encoded, positions)
        return masks.squeeze(0), scores.squeeze(0)

    def _tensor(self, values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values))[None].to(self._device)

    def _at_work(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
