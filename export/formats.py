"""The number formats a pretrained MLLM is exported in, by the name that a manifest gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class Format:
    """What each part of a bundle is written as.

    Attributes:
        dtype: floating type of the MLLM's activations, and of weights that are not whole numbers.
        decoder_bits, vision_bits: bits of the matrices' whole numbers in blocks; None: floating.
        segmenter: precision of the segmenter beside it.
    """

    dtype: Any
    decoder_bits: int | None = None
    vision_bits: int | None = None
    segmenter: str = "fp32"

    @property
    def vision(self) -> str:
        """The name of the format of the vision tower: towers in one format are one file."""
        return "int8" if self.vision_bits else {v: k for k, v in _FLOATING.items()}[self.dtype]


_FLOATING = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}
# The vision tower reads every image once, the decoder each token: four bits gain little in the tower.
FORMATS = {
    **{name: Format(dtype) for name, dtype in _FLOATING.items()},
    "int8": Format(np.float32, 8, 8, "int8"),
    "int4": Format(np.float32, 4, 8, "int8"),
}
NOT_ON_CPU = frozenset({"bf16"})
"""Formats whose graphs onnxruntime's CPU provider has no kernels for: written and checked, not run."""
