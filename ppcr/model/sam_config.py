"""Sizes of a segmenter of the SAM family, written as segmenter/config.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ppcr.model.segmenter_files import parse_config
from ppcr.model.tiny_vit import TinyViTSizes

ARCHITECTURES = ("mobile_sam", "sam", "sam2")


@dataclass(frozen=True)
class SamConfig:
    """A SAM, SAM 2 or MobileSAM with a path for text.

    architecture: which image encoder and which variant of the decoder, one of `ARCHITECTURES`.
    encoder: sizes of the image encoder: `TinyViTSizes`, or fields of transformers' vision configuration.
    image_size: side of the square input in pixels; patch: pixels a cell of image_features is wide.
    pixel_mean, pixel_std: normalisation of RGB in 0..1 that `encode` expects.
    dim, layers, heads, head_dim, mlp: of the mask decoder, whose cross attention is heads * head_dim wide.
    norm_eps: of the norms inside its layers (1e-5 in the official code, 1e-6 in transformers' SamModel).
    score_hidden, score_layers: of the head that predicts a mask's IoU.
    points: whether points count beside boxes; False: the box alone, as SAM is mostly prompted.
    stability: SAM 2's choice of another mask where the first is unstable: (delta, threshold); None: never.
    text_dim: width of the MLLM's input embedding; max_text: longest semantic prompt in tokens.
    """

    architecture: str = "mobile_sam"
    encoder: dict[str, Any] = field(default_factory=dict)
    image_size: int = 1024
    patch: int = 16
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    dim: int = 256
    layers: int = 2
    heads: int = 8
    head_dim: int = 16
    mlp: int = 2048
    norm_eps: float = 1e-5
    mask_tokens: int = 4
    score_hidden: int = 256
    score_layers: int = 3
    points: bool = False
    stability: tuple[float, float] | None = None
    text_dim: int = 256
    text_layers: int = 2
    text_tokens: int = 8
    max_text: int = 64

    @property
    def grid(self) -> int:
        """Side of image_features in cells."""
        return self.image_size // self.patch

    @property
    def mask_size(self) -> int:
        """Side of the mask logits."""
        return 4 * self.grid

    @property
    def has_high_res(self) -> bool:
        """Whether finer features go from the image encoder to the mask decoder."""
        return self.architecture == "sam2"

    @property
    def tiny_vit(self) -> TinyViTSizes:
        """`encoder` of a "mobile_sam"."""
        sizes: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.encoder.items()}
        return TinyViTSizes(**sizes)

    @classmethod
    def from_json(cls, text: str) -> SamConfig:
        """Read config.json's text. Raises ValueError, as `parse_config`."""
        return parse_config(cls, text, ARCHITECTURES)
