"""Image encoders of the SAM family: TinyViT of our own, ViT and Hiera as transformers has them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ppcr.model.image_encoder import ImageFeatures
from ppcr.model.sam_config import SamConfig
from ppcr.model.tiny_vit import TinyViT


class PlainFeatures(NamedTuple):
    """What decoding needs of an image without finer features: image_features f[B, C, S/16, S/16]."""

    image_features: Tensor


class MobileSamEncoder(nn.Module):
    """TinyViT: pixels f32[B, 3, S, S] -> `PlainFeatures`."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.model = TinyViT(config.tiny_vit, config.dim)

    def forward(self, pixels: Tensor) -> PlainFeatures:
        return PlainFeatures(self.model(pixels))


class SamEncoder(nn.Module):
    """SAM's ViT: pixels f32[B, 3, S, S] -> `PlainFeatures`."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        from transformers import SamVisionConfig
        from transformers.models.sam.modeling_sam import SamVisionEncoder

        # The fused attention of torch cannot be exported with this model's views.
        vision = SamVisionConfig(**config.encoder)
        self.model = SamVisionEncoder._from_config(vision, attn_implementation="eager")

    def forward(self, pixels: Tensor) -> PlainFeatures:
        return PlainFeatures(self.model(pixels)[0])


class Sam2Encoder(nn.Module):
    """SAM 2's Hiera with its pyramid: pixels f32[B, 3, S, S] -> `ImageFeatures` at S/16, S/8 and S/4.

    The pyramid's finer levels leave at the width the mask decoder adds them at, so that decoding again does
    not project them again.
    """

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        from transformers import Sam2VisionConfig, Sam2VisionModel

        vision = Sam2VisionConfig(**config.encoder)
        self.model = Sam2VisionModel._from_config(vision, attn_implementation="eager")
        self.no_memory = nn.Parameter(torch.zeros(config.dim))
        self.high_0 = nn.Conv2d(config.dim, config.dim // 4, 1)
        self.high_1 = nn.Conv2d(config.dim, config.dim // 8, 1)

    def forward(self, pixels: Tensor) -> ImageFeatures:
        quarter, eighth, sixteenth = self.model(pixels).fpn_hidden_states
        features = sixteenth + self.no_memory[:, None, None]
        return ImageFeatures(features, self.high_0(eighth), self.high_1(quarter))


ENCODERS: dict[str, type[nn.Module]] = {
    "mobile_sam": MobileSamEncoder,
    "sam": SamEncoder,
    "sam2": Sam2Encoder,
}
"""By `SamConfig.architecture`."""
