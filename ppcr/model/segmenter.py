"""The promptable segmenter "ppcr_tiny": encode an image once, decode any number of prompts of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ppcr.model.image_encoder import ImageEncoder
from ppcr.model.mask_decoder import CellFeatures, MaskDecoder
from ppcr.model.prompt_encoder import PromptEncoder, Prompts
from ppcr.model.segmenter_files import fill, parse_config, read_config, save_segmenter


@dataclass(frozen=True)
class SegmenterConfig:
    """Sizes of the segmenter; written as segmenter/config.json.

    image_size: side of the square input in pixels; masks are drawn at half of it.
    pixel_mean, pixel_std: normalisation of RGB in 0..1 that `encode` expects.
    text_dim: width of the MLLM's input embedding; max_text: longest semantic prompt in tokens.
    """

    architecture: str = "ppcr_tiny"
    image_size: int = 256
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    dim: int = 128
    high_res: tuple[int, int] = (32, 16)
    encoder_blocks: int = 2
    context_dim: int = 192
    context_blocks: int = 2
    text_dim: int = 256
    text_layers: int = 2
    text_tokens: int = 8
    max_text: int = 64
    decoder_layers: int = 2
    heads: int = 4
    head_dim: int = 16
    mlp: int = 256

    @property
    def grid(self) -> int:
        """Side of image_features in cells."""
        return self.image_size // 8

    @property
    def mask_size(self) -> int:
        """Side of the mask logits."""
        return self.image_size // 2

    @classmethod
    def from_json(cls, text: str) -> SegmenterConfig:
        """Read config.json's text. Raises ValueError, as `parse_config`."""
        return parse_config(cls, text, (cls.architecture,))


class Segmenter(nn.Module):
    """Image encoder, prompt encoder and mask decoder as one module."""

    features = CellFeatures
    """What `encode` answers with."""

    def __init__(self, config: SegmenterConfig | None = None) -> None:
        super().__init__()
        self.config = c = config or SegmenterConfig()
        self.image_encoder = ImageEncoder(
            image_size=c.image_size,
            dim=c.dim,
            high_res=c.high_res,
            context=c.context_dim,
            blocks=c.encoder_blocks,
            context_blocks=c.context_blocks,
        )
        self.prompt_encoder = PromptEncoder(
            dim=c.dim,
            grid=c.grid,
            embedding_dim=c.text_dim,
            text_heads=c.heads,
            text_layers=c.text_layers,
            text_tokens=c.text_tokens,
            max_text=c.max_text,
        )
        self.mask_decoder = MaskDecoder(
            dim=c.dim,
            grid=c.grid,
            high_res=c.high_res,
            layers=c.decoder_layers,
            heads=c.heads,
            head_dim=c.head_dim,
            mlp=c.mlp,
        )

    def encode(self, pixels: Tensor) -> CellFeatures:
        """pixels f32[B, 3, S, S], RGB normalised with pixel_mean and pixel_std -> features."""
        features: CellFeatures = self.mask_decoder.prepare(self.image_encoder(pixels))
        return features

    def decode(
        self,
        features: CellFeatures,
        boxes: Tensor,
        points: Tensor,
        spatial_valid: Tensor,
        text_embeddings: Tensor,
        text_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """N prompts of one image: the form that is exported.

        features of batch 1; boxes f32[N, 4] xyxy in 0..1; points f32[N, 2] xy in 0..1; spatial_valid f32[N];
        text_embeddings f32[N, T, text_dim]; text_mask bool[N, T], all False for no text
        -> mask logits f32[N, S/2, S/2] (above 0: foreground) and scores f32[N], the predicted IoU in 0..1.
        """
        given = (boxes, points, spatial_valid, text_embeddings, text_mask)
        masks, scores = self.decode_batch(features, Prompts(*(t.unsqueeze(0) for t in given)))
        return masks.squeeze(0), scores.squeeze(0)

    def decode_batch(self, features: CellFeatures, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """K prompts for each of B images -> mask logits f[B, K, S/2, S/2] and scores f32[B, K]."""
        encoded = self.prompt_encoder(prompts)
        masks, scores = self.mask_decoder(features, encoded, self.prompt_encoder.cell_positions)
        return masks, scores

    def forward(self, pixels: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Encode and decode: pixels f32[B, 3, S, S] and prompts [B, K, ...] -> logits and scores."""
        return self.decode_batch(self.encode(pixels), prompts)

    def save(self, folder: str | Path, *, half: bool = False) -> None:
        """Write config.json and model.safetensors (fp16 where `half`) into `folder`."""
        save_segmenter(self, self.config, folder, half=half)

    @classmethod
    def load(cls, folder: str | Path) -> Segmenter:
        """Read what `save` wrote, as an fp32 module in evaluation mode on the CPU.

        Raises:
            FileNotFoundError, ValueError: a file is missing or damaged, or is not of this architecture.
        """
        return fill(cls(SegmenterConfig.from_json(read_config(folder))), folder)


def normalize(image: Tensor, config: SegmenterConfig) -> Tensor:
    """RGB f32[B, 3, S, S] in 0..1 -> pixels as `encode` expects them."""
    mean = torch.tensor(config.pixel_mean, device=image.device).view(1, 3, 1, 1)
    std = torch.tensor(config.pixel_std, device=image.device).view(1, 3, 1, 1)
    return (image - mean) / std
