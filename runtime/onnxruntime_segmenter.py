"""The segmenter on onnxruntime: features stay in its memory, many masks are drawn a part at a time."""

from __future__ import annotations

import numpy as np

from ppcr.errors import BundleError
from ppcr.manifest import REBUILD
from runtime.onnxruntime_library import Session, Value
from runtime.session import Float32Array, Prompts

# Features of one image stay in onnxruntime's own memory between encoder and decoder.
SegmenterFeatures = dict[str, Value]
MASK_PIXELS = 1 << 19
"""Pixels of mask logits drawn at once: 8 masks of SAM's, 32 of ppcr-tiny's. More is no faster, and its fresh
memory slower."""


class OnnxSegmenter:
    """`runtime.session.SegmenterSession`. Threads may share it."""

    most_at_once = 4
    """Masks drawn at once: the cells of a few stay in a processor's cache, those of many do not."""

    def __init__(self, image_encoder: Session, mask_decoder: Session) -> None:
        self._encoder, self._decoder = image_encoder, mask_decoder
        # Families differ in what they keep of an image: SAM 2 and ppcr-tiny add finer features.
        self._encoded = [output.name for output in image_encoder.get_outputs()]
        # Upscaled cells of one mask take megabytes: many masks are drawn a part at a time.
        height, width = (side for side in mask_decoder.get_outputs()[0].shape[1:])
        self._most = max(1, min(self.most_at_once, MASK_PIXELS // (height * width)))
        wanted = {value.name for value in mask_decoder.get_inputs()}
        if not set(self._encoded) <= wanted:
            raise BundleError(f"the mask decoder does not take what the image encoder gives: {REBUILD}")

    def encode(self, pixels: Float32Array) -> SegmenterFeatures:
        """Pixels f32 [3, H, W] to the features of one image, by output name."""
        return self._encode(pixels[None])

    def encode_batch(self, pixels: Float32Array) -> list[SegmenterFeatures]:
        """Pixels f32 [B, 3, H, W] to the features of each image, computed as one batch."""
        together = {name: value.numpy() for name, value in self._encode(pixels).items()}
        return [
            {name: Value.ortvalue_from_numpy(value[i : i + 1]) for name, value in together.items()}
            for i in range(len(pixels))
        ]

    def _encode(self, pixels: Float32Array) -> SegmenterFeatures:
        value = Value.ortvalue_from_numpy(np.ascontiguousarray(pixels, np.float32))
        outputs = self._encoder.run_with_ort_values(self._encoded, {"pixels": value})
        return dict(zip(self._encoded, outputs, strict=True))

    def decode(self, features: SegmenterFeatures, prompts: Prompts) -> tuple[Float32Array, Float32Array]:
        """Mask logits f32 [N, h, w] and scores f32 [N]."""
        count = len(prompts.boxes)
        if count <= self._most:
            return self._decode(features, prompts)
        parts = []
        for first in range(0, count, self._most):
            some = (part[first : first + self._most] for part in vars(prompts).values())
            parts.append(self._decode(features, Prompts(*some)))
        logits, scores = zip(*parts, strict=True)
        return np.concatenate(logits), np.concatenate(scores)

    def _decode(self, features: SegmenterFeatures, prompts: Prompts) -> tuple[Float32Array, Float32Array]:
        given = {
            "boxes": prompts.boxes,
            "points": prompts.points,
            "spatial_valid": prompts.spatial_valid,
            "text_embeddings": prompts.text_embeddings,
            "text_mask": prompts.text_mask,
        }
        feed = {name: Value.ortvalue_from_numpy(np.ascontiguousarray(a)) for name, a in given.items()}
        logits, scores = self._decoder.run_with_ort_values(["mask_logits", "scores"], {**features, **feed})
        return logits.numpy(), scores.numpy()
