"""The two-way mask decoder: prompts and image cells read each other, then each prompt draws its mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.op import prompt_feature_attention
from kernels.reference import IMAGE_TO_PROMPT, PROMPT_TO_IMAGE, Weights
from kernels.token_op import token_attention, token_mlp
from ppcr.model.image_encoder import ImageFeatures
from ppcr.model.layers import Mlp, Norm, TokenAttention
from ppcr.model.prompt_encoder import EncodedPrompts


class CellFeatures(NamedTuple):
    """Features of an image in the order of the decoder's N cells, channels last; one for all its prompts.

    image_features f[B, 1, N, C]; high_res_0 f[B, 1, N, 4, C0] and high_res_1 f[B, 1, N, 4, 4, C1], what the
    finer levels add while a mask is drawn.
    """

    image_features: Tensor
    high_res_0: Tensor
    high_res_1: Tensor


class PromptFeatureAttention(nn.Module):
    """Attention between a few prompt tokens and many image cells, with the residual and norm that close it.

    The one place where prompts meet image features, in either direction: prompt to image (skinny queries,
    long keys) and image to prompt (long queries, skinny keys). The inner width heads * head_dim is narrower
    than the model. `kernels.op` runs it: fused on a GPU, standard operators elsewhere and in exported graphs.

    Shapes: x f[B, K or 1, Q, C] with x_position like x or f[Q, C] reads y f[B, K or 1, N, C] with y_position;
    `norm` closes, `after` f[B, K, Q, C] is added to the result f[B, K, Q, C]. A dimension of 1 is shared by
    all prompts of an image: it is never copied.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, direction: str) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.direction = heads, direction
        self.q, self.k, self.v = (nn.Linear(dim, inner) for _ in range(3))
        self.out = nn.Linear(inner, dim)

    def forward(
        self,
        x: Tensor,
        x_position: Tensor,
        y: Tensor,
        y_position: Tensor,
        norm: nn.LayerNorm,
        after: Tensor | None = None,
    ) -> Tensor:
        return prompt_feature_attention(
            x, x_position, y, y_position, _weights(self, norm),
            direction=self.direction, heads=self.heads, eps=norm.eps, after=after,
        )  # fmt: skip


class TwoWayLayer(nn.Module):
    """Tokens among themselves, tokens from image, MLP, image from tokens; each with a residual and a norm.

    tokens f[B, K, M, C], image f[B, K or 1, N, C], token_position like tokens, cell_position f[N, C], dense
    f[B, K, N, C] to be added to the image -> tokens, image f[B, K, N, C].
    """

    def __init__(self, dim: int, heads: int, head_dim: int, mlp: int) -> None:
        super().__init__()
        self.self_attention = TokenAttention(dim, heads)
        self.prompt_to_image = PromptFeatureAttention(dim, heads, head_dim, PROMPT_TO_IMAGE)
        self.mlp = Mlp(dim, mlp)
        self.image_to_prompt = PromptFeatureAttention(dim, heads, head_dim, IMAGE_TO_PROMPT)
        self.norms = nn.ModuleList(Norm(dim) for _ in range(4))

    def forward(
        self,
        tokens: Tensor,
        image: Tensor,
        token_position: Tensor,
        cell_position: Tensor,
        dense: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        norms = [norm for norm in self.norms if isinstance(norm, nn.LayerNorm)]
        _, after_image, after_mlp, after_prompt = norms
        tokens = self.among_tokens(tokens, token_position)
        tokens = self.prompt_to_image(tokens, token_position, image, cell_position, after_image)
        first, second = [layer for layer in self.mlp if isinstance(layer, nn.Linear)]
        tokens = token_mlp(
            tokens, first.weight, first.bias, second.weight, second.bias, (after_mlp.weight, after_mlp.bias),
            eps=after_mlp.eps,
        )  # fmt: skip
        image = self.image_to_prompt(image, cell_position, tokens, token_position, after_prompt, dense)
        return tokens, image

    def among_tokens(self, tokens: Tensor, position: Tensor) -> Tensor:
        """The layer's first step: f[B, K, M, C] twice -> f[B, K, M, C]."""
        norm = self.norms[0]
        assert isinstance(norm, nn.LayerNorm)
        return token_attention(
            tokens, position, _weights(self.self_attention, norm),
            heads=self.self_attention.heads, eps=norm.eps,
        )  # fmt: skip


class MaskDecoder(nn.Module):
    """Features of B images, prompts [B, K] -> mask logits f[B, K, S/2, S/2] and scores f32[B, K] in 0..1.

    Upscaling keeps the 4x4 pixels of a cell in the channel dimension until the mask is one channel deep: the
    image's features are rearranged once (`prepare`), and nothing but masks is permuted per prompt.

    Args:
        dim: C, channels of tokens and cells. grid: cells along a side, S / 8.
        high_res: (C0, C1), channels of the finer levels.
        layers: two-way layers, each with `heads` heads of `head_dim` where prompts meet cells, and an MLP
            `mlp` wide.
    """

    def __init__(
        self,
        *,
        dim: int,
        grid: int,
        high_res: tuple[int, int],
        layers: int,
        heads: int,
        head_dim: int,
        mlp: int,
    ) -> None:
        super().__init__()
        c0, c1 = high_res
        self.grid, self.high_res = grid, high_res
        self.queries = nn.Parameter(torch.randn(2, dim))  # mask, score
        self.layers = nn.ModuleList(TwoWayLayer(dim, heads, head_dim, mlp) for _ in range(layers))
        self.last_prompt_to_image = PromptFeatureAttention(dim, heads, head_dim, PROMPT_TO_IMAGE)
        self.last_norm = Norm(dim)
        self.up_0, self.up_1 = nn.Linear(dim, 4 * c0), nn.Linear(c0, 4 * c1)
        self.skip_0, self.skip_1 = nn.Linear(c0, c0), nn.Linear(c1, c1)
        self.mask_head = Mlp(dim, dim, c1 + 1)
        self.score_head = Mlp(dim, dim, 1)
        bias = self.mask_head.get_parameter("2.bias")
        nn.init.constant_(bias[-1:], -3.0)  # an empty mask to begin with: objects are small

    def prepare(self, features: ImageFeatures) -> CellFeatures:
        """What decoding needs of an image and no prompt changes: part of encoding it."""
        c0, c1 = self.high_res
        # Cells of the grid, then the 2x2 quarters of a cell, then the 2x2 pixels of a quarter. The biases of
        # what the finer levels are added to come along.
        high_0 = quarters(self.skip_0(rows(features.high_res_0)), self.grid)
        high_1 = sixteenths(self.skip_1(rows(features.high_res_1)), self.grid)
        return CellFeatures(
            # Laid out by cells once, not by every kernel that reads it.
            rows(features.image_features).contiguous().unsqueeze(1),
            high_0 + self.up_0.bias.view(4, c0),
            high_1 + self.up_1.bias.view(4, c1),
        )

    def forward(
        self, features: CellFeatures, prompts: EncodedPrompts, cell_position: Tensor
    ) -> tuple[Tensor, Tensor]:
        image = features.image_features
        cell_position = cell_position.to(image.dtype)
        b, k = prompts.tokens.shape[:2]
        queries = self.queries.to(prompts.tokens.dtype).expand(b, k, -1, -1)
        position = torch.cat([queries, prompts.tokens], dim=-2)
        tokens = position
        for index, layer in enumerate(self.layers):
            # Joins after the first layer, so that all prompts of an image share that one's keys and values.
            dense = prompts.dense if index == 0 else None
            tokens, image = layer(tokens, image, position, cell_position, dense)
        tokens = self.last_prompt_to_image(tokens, position, image, cell_position, self.last_norm)
        mask_token, score_token = tokens[..., 0, :], tokens[..., 1, :]
        scores = torch.sigmoid(self.score_head(score_token).float()).squeeze(-1)
        return self._draw(image, features, self.mask_head(mask_token)), scores

    def _draw(self, image: Tensor, features: CellFeatures, weights: Tensor) -> Tensor:
        """Cells f[B, K, N, C] and mask weights f[B, K, C1 + 1] -> logits f[B, K, 4*grid, 4*grid]."""
        c0, c1 = self.high_res
        x = (F.linear(image, self.up_0.weight).unflatten(-1, (4, c0)) + features.high_res_0).relu()
        x = (F.linear(x, self.up_1.weight).unflatten(-1, (4, c1)) + features.high_res_1).relu()
        x = x.flatten(2, 4)  # [B, K, N*16, C1]
        logits = x @ weights[..., :c1, None] + weights[..., None, c1:]  # [B, K, N*16, 1]
        return spread(logits, self.grid)


def _weights(attention: PromptFeatureAttention | TokenAttention, norm: nn.LayerNorm) -> Weights:
    layers = attention.q, attention.k, attention.v, attention.out, norm
    return Weights(*(t for layer in layers for t in (layer.weight, layer.bias)))


def rows(x: Tensor) -> Tensor:
    """f[B, C, h, w] -> f[B, h*w, C]"""
    return x.flatten(2).transpose(1, 2)


def quarters(x: Tensor, grid: int) -> Tensor:
    """Pixels f[B, (2*grid)**2, C] -> f[B, 1, grid*grid, 4, C], the 2x2 pixels of each cell.

    Channels stay innermost in the permutation, which thus moves blocks instead of single numbers.
    """
    x = x.unflatten(1, (grid, 2, grid, 2)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2).unsqueeze(1)


def sixteenths(x: Tensor, grid: int) -> Tensor:
    """Pixels f[B, (4*grid)**2, C] -> f[B, 1, grid*grid, 4, 4, C], the 2x2 pixels of a cell's 2x2 quarters."""
    x = x.unflatten(1, (grid, 2, 2, grid, 2, 2)).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.flatten(5, 6).flatten(3, 4).flatten(1, 2).unsqueeze(1)


def spread(logits: Tensor, grid: int) -> Tensor:
    """f[B, K, grid * grid * 16, 1] in the order of `sixteenths` -> f[B, K, 4 * grid, 4 * grid]."""
    x = logits.reshape(*logits.shape[:2], grid, grid, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7)
    return x.flatten(5, 7).flatten(2, 4)
