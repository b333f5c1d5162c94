"""A segmenter of the SAM family behind the interface of `ppcr.model.segmenter.Segmenter`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ppcr.model.image_encoder import ImageFeatures
from ppcr.model.prompt_encoder import Prompts
from ppcr.model.sam_config import SamConfig
from ppcr.model.sam_decoder import SamMaskDecoder
from ppcr.model.sam_features import ENCODERS, PlainFeatures
from ppcr.model.sam_prompts import SamPromptEncoder
from ppcr.model.segmenter_files import fill, read_config, save_segmenter


class SamSegmenter(nn.Module):
    """Image encoder, prompt encoder and mask decoder as one module."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = ENCODERS[config.architecture](config)
        self.prompt_encoder = SamPromptEncoder(config)
        self.mask_decoder = SamMaskDecoder(config)

    @property
    def features(self) -> type[ImageFeatures] | type[PlainFeatures]:
        """What `encode` answers with."""
        return ImageFeatures if self.config.has_high_res else PlainFeatures

    def encode(self, pixels: Tensor) -> ImageFeatures | PlainFeatures:
        """pixels f32[B, 3, S, S], RGB normalised with pixel_mean and pixel_std -> features."""
        features: ImageFeatures | PlainFeatures = self.image_encoder(pixels)
        return features

    def decode(
        self,
        features: ImageFeatures | PlainFeatures,
        boxes: Tensor,
        points: Tensor,
        spatial_valid: Tensor,
        text_embeddings: Tensor,
        text_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """N prompts of one image: the form that is exported.

        features of batch 1; boxes f32[N, 4] xyxy and points f32[N, 2] xy, in 0..1 of the square input;
        spatial_valid f32[N]; text_embeddings f32[N, T, text_dim]; text_mask bool[N, T], all False for no text
        -> mask logits f32[N, S/4, S/4] (above 0: foreground) and scores f32[N], the predicted IoU in 0..1.
        """
        given = (boxes, points, spatial_valid, text_embeddings, text_mask)
        masks, scores = self.decode_batch(features, Prompts(*(t.unsqueeze(0) for t in given)))
        return masks.squeeze(0), scores.squeeze(0)

    def decode_batch(
        self, features: ImageFeatures | PlainFeatures, prompts: Prompts
    ) -> tuple[Tensor, Tensor]:
        """K prompts for each of B images -> mask logits f[B, K, S/4, S/4] and scores f32[B, K]."""
        encoded = self.prompt_encoder(prompts)
        masks, scores = self.mask_decoder(features, encoded, self.prompt_encoder.cell_positions)
        return masks, scores

    def forward(self, pixels: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Encode and decode: pixels f32[B, 3, S, S] and prompts [B, K, ...] -> logits and scores."""
        return self.decode_batch(self.encode(pixels), prompts)

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`."""
        save_segmenter(self, self.config, folder)

    @classmethod
    def load(cls, folder: str | Path) -> SamSegmenter:
        """Read what `save` wrote, as an fp32 module in evaluation mode on the CPU.

        Raises:
            FileNotFoundError, ValueError: a file is missing or damaged, or is not of this family.
        """
        return fill(cls(SamConfig.from_json(read_config(folder))), folder)
