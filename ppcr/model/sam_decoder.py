"""SAM's mask decoder, SAM 2's variant included, for any number of prompts of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.reference import PROMPT_TO_IMAGE
from ppcr.model.image_encoder import ImageFeatures
from ppcr.model.layers import Norm
from ppcr.model.mask_decoder import (
    PromptFeatureAttention,
    TwoWayLayer,
    quarters,
    rows,
    sixteenths,
    spread,
)
from ppcr.model.sam_config import SamConfig
from ppcr.model.sam_features import PlainFeatures
from ppcr.model.sam_prompts import SamPrompts, SemanticReader


class SamTwoWayLayer(TwoWayLayer):
    """A two-way layer with SAM's norms; in the first, tokens attend to tokens without position or skip."""

    def __init__(self, config: SamConfig, *, first: bool) -> None:
        super().__init__(config.dim, config.heads, config.head_dim, config.mlp)
        self.first = first
        self.norms = nn.ModuleList(Norm(config.dim, eps=config.norm_eps) for _ in range(4))

    def among_tokens(self, tokens: Tensor, position: Tensor) -> Tensor:
        if not self.first:
            return super().among_tokens(tokens, position)
        normed: Tensor = self.norms[0](self.self_attention(tokens, tokens, tokens))
        return normed


class Perceptron(nn.Sequential):
    """`layers` linear layers with ReLU between them."""

    def __init__(self, dim: int, hidden: int, out: int, layers: int) -> None:
        widths = [dim, *[hidden] * (layers - 1), out]
        parts: list[nn.Module] = []
        for here, there in zip(widths[:-1], widths[1:], strict=True):
            parts += [nn.Linear(here, there), nn.ReLU()]
        super().__init__(*parts[:-1])


class SamMaskDecoder(nn.Module):
    """Features of B images, prompts [B, K] -> mask logits f[B, K, S/4, S/4] and scores f32[B, K] in 0..1.

    Upscaling keeps the 4x4 pixels of a cell in the channel dimension until the mask is one channel deep, as
    in `ppcr.model.mask_decoder`: transposed convolutions of stride 2 are linear layers then, and nothing but
    masks is permuted per prompt. Keys and values of the first layer are shared by all prompts of an image.
    """

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        dim = config.dim
        c0, c1 = self.channels = dim // 4, dim // 8
        self.grid, self.stability = config.grid, config.stability
        # SAM 2 has a token more, which tells whether there is an object, before those of score and masks.
        self.score_at = 1 if config.architecture == "sam2" else 0
        self.queries = nn.Parameter(torch.randn(self.score_at + 1 + config.mask_tokens, dim))
        self.semantic = SemanticReader(dim, config.heads)
        self.no_mask = nn.Parameter(torch.randn(dim))
        self.layers = nn.ModuleList(SamTwoWayLayer(config, first=i == 0) for i in range(config.layers))
        self.last_prompt_to_image = PromptFeatureAttention(
            dim, config.heads, config.head_dim, PROMPT_TO_IMAGE
        )
        self.last_norm = Norm(dim)
        self.up_0, self.up_1 = nn.Linear(dim, 4 * c0), nn.Linear(c0, 4 * c1)
        self.up_norm = Norm(c0, eps=1e-6)
        # Of SAM's masks the first is the one for an unambiguous prompt; the others only stand in for it.
        masks = 1 if config.stability is None else config.mask_tokens
        self.mask_heads = nn.ModuleList(Perceptron(dim, dim, c1, 3) for _ in range(masks))
        self.score_head = Perceptron(dim, config.score_hidden, config.mask_tokens, config.score_layers)
        self.squash = config.architecture == "sam2"

    def forward(
        self, features: ImageFeatures | PlainFeatures, prompts: SamPrompts, cell_position: Tensor
    ) -> tuple[Tensor, Tensor]:
        image = rows(features.image_features).unsqueeze(1) + self.no_mask
        b, k = prompts.spatial.shape[:2]
        queries = self.queries.expand(b, k, -1, -1)
        position = self.semantic(torch.cat([queries, prompts.spatial], dim=-2), prompts.text)
        tokens = position
        for layer in self.layers:
            tokens, image = layer(tokens, image, position, cell_position)
        # Tokens that nothing is read from any more need not read the image once more.
        used = slice(self.score_at, self.score_at + 1 + len(self.mask_heads))
        tokens = self.last_prompt_to_image(
            tokens[..., used, :], position[..., used, :], image, cell_position, self.last_norm
        )
        scores = self.score_head(tokens[..., 0, :]).float()
        scores = scores.sigmoid() if self.squash else scores.clamp(0.0, 1.0)
        heads = enumerate(self.mask_heads, 1)
        weights = torch.stack([head(tokens[..., index, :]) for index, head in heads], dim=-1)
        logits = self._draw(image, features, weights)
        if self.stability is None:
            return spread(logits, self.grid), scores[..., 0]
        logits, scores = _steadiest(logits, scores, *self.stability)
        return spread(logits, self.grid), scores

    def _draw(self, image: Tensor, features: ImageFeatures | PlainFeatures, weights: Tensor) -> Tensor:
        """Cells f[B, K, N, C] and mask weights f[B, K, C1, M] -> logits f[B, K, N * 16, M]."""
        c0, c1 = self.channels
        x = self.up_0(image).unflatten(-1, (4, c0))  # [B, K, N, 4, C0]
        if isinstance(features, ImageFeatures):
            x = x + quarters(rows(features.high_res_0), self.grid)
        x = self.up_1(F.gelu(self.up_norm(x))).unflatten(-1, (4, c1))  # [B, K, N, 4, 4, C1]
        if isinstance(features, ImageFeatures):
            x = x + sixteenths(rows(features.high_res_1), self.grid)
        return F.gelu(x).flatten(2, 4) @ weights


def _steadiest(logits: Tensor, scores: Tensor, delta: float, threshold: float) -> tuple[Tensor, Tensor]:
    """The first mask, or where it is unstable the one of the others with the best score.

    logits f[B, K, P, M], scores f[B, K, M] -> f[B, K, P, 1] and f[B, K]. A mask is stable if it hardly grows
    from the pixels above `delta` to those above -`delta`.
    """
    first = logits[..., 0]
    small, large = (first > delta).sum(-1).float(), (first > -delta).sum(-1).float()
    stable = (small / large.clamp(min=1.0) >= threshold) | (large == 0)
    best = scores[..., 1:].argmax(-1) + 1
    chosen = torch.where(stable, torch.zeros_like(best), best).unsqueeze(-1)  # [B, K, 1]
    places = chosen.unsqueeze(-1).expand(*logits.shape[:-1], 1)
    return logits.gather(-1, places), scores.gather(-1, chosen).squeeze(-1)
