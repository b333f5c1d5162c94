"""Turns the semantic prompt's text and the spatial prompt's box and point into the decoder's tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ppcr.model.layers import FourierPosition, Mlp, Norm, TokenAttention, grid_centers


class Prompts(NamedTuple):
    """Prompts of B images, K for each.

    boxes f32[B, K, 4] xyxy in 0..1; points f32[B, K, 2] xy in 0..1; spatial_valid f32[B, K], 1 where box and
    point count and 0 where they are replaced by learned tokens; text_embeddings f32[B, K, T, E], rows of the
    MLLM's input embedding for the semantic prompt; text_mask bool[B, K, T], False for padding, a row of
    nothing but False meaning "no text".
    """

    boxes: Tensor
    points: Tensor
    spatial_valid: Tensor
    text_embeddings: Tensor
    text_mask: Tensor


class EncodedPrompts(NamedTuple):
    """tokens f[B, K, M, C]; dense f[B, K, N, C], what each image cell is told about box and point."""

    tokens: Tensor
    dense: Tensor


class TextBlock(nn.Module):
    """Pre-norm self-attention and MLP over a short text: f[..., T, C] -> f[..., T, C]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = Norm(dim), Norm(dim)
        self.attention, self.mlp = TokenAttention(dim, heads), Mlp(dim, 2 * dim)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        y = self.norm_attention(x)
        x = x + self.attention(y, y, y, bias)
        return x + self.mlp(self.norm_mlp(x))


class TextEncoder(nn.Module):
    """Reads a text of any length into a fixed number of tokens.

    A fixed number keeps the mask decoder's attention free of masks and its shapes static but for the prompts.

    Args:
        embedding_dim: E, width of the MLLM's input embedding. dim: C, width of the tokens written.
        heads, layers: of the self-attention over the text. tokens: how many are written.
        max_length: longest text in tokens.
    """

    def __init__(
        self, *, embedding_dim: int, dim: int, heads: int, layers: int, tokens: int, max_length: int
    ) -> None:
        super().__init__()
        # The scale of the MLLM's embedding is not ours to know: normalise before and after the projection.
        self.norm_in = Norm(embedding_dim, elementwise_affine=False)
        self.projection = nn.Linear(embedding_dim, dim)
        self.norm_projection = Norm(dim)
        self.positions = nn.Parameter(0.5 * torch.randn(max_length, dim))
        self.blocks = nn.ModuleList(TextBlock(dim, heads) for _ in range(layers))
        self.norm_out = Norm(dim)
        self.slots = nn.Parameter(torch.randn(tokens, dim))
        self.read = TokenAttention(dim, heads)
        self.norm_read = Norm(dim)
        self.no_text = nn.Parameter(torch.randn(tokens, dim))

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """f32[..., T, E], bool[..., T] -> f[..., tokens, C]; T at most max_length."""
        keep = mask.to(embeddings.dtype)
        bias = ((keep - 1.0) * 1e4)[..., None, None, :]
        x = self.norm_projection(self.projection(self.norm_in(embeddings)))
        x = x + self.positions[: embeddings.shape[-2]]
        for block in self.blocks:
            x = block(x, bias)
        x = self.norm_out(x)
        read = self.norm_read(self.slots + self.read(self.slots, x, x, bias))
        has_text = keep.amax(-1)[..., None, None]
        return has_text * read + (1.0 - has_text) * self.no_text


SPATIAL_TOKENS = 3
"""Tokens before the text's: upper left corner, lower right corner, point."""


class PromptEncoder(nn.Module):
    """Prompts -> EncodedPrompts: tokens of two corners, a point and the text, and the dense part.

    Args:
        dim: C. grid: image cells along a side. embedding_dim: E, width of the MLLM's input embedding.
        text_heads, text_layers, text_tokens, max_text: of the `TextEncoder`.
    """

    cells: Tensor
    cell_positions: Tensor

    def __init__(
        self,
        *,
        dim: int,
        grid: int,
        embedding_dim: int,
        text_heads: int,
        text_layers: int,
        text_tokens: int,
        max_text: int,
    ) -> None:
        super().__init__()
        self.position = FourierPosition(dim)
        self.text = TextEncoder(
            embedding_dim=embedding_dim,
            dim=dim,
            heads=text_heads,
            layers=text_layers,
            tokens=text_tokens,
            max_length=max_text,
        )
        self.kinds = nn.Parameter(torch.randn(SPATIAL_TOKENS, dim))
        self.no_spatial = nn.Parameter(torch.randn(SPATIAL_TOKENS, dim))
        self.dense = Mlp(_DENSE_FEATURES, dim // 2, dim)
        self.no_dense = nn.Parameter(torch.zeros(dim))
        self.register_buffer("cells", grid_centers(grid), persistent=False)
        self.register_buffer("cell_positions", self.position(grid_centers(grid)), persistent=False)

    def forward(self, prompts: Prompts) -> EncodedPrompts:
        boxes, points, valid = prompts.boxes, prompts.points, prompts.spatial_valid
        places = torch.stack([boxes[..., :2], boxes[..., 2:], points], dim=-2)
        use = valid[..., None, None]
        spatial = use * (self.position(places) + self.kinds) + (1.0 - use) * self.no_spatial
        text = self.text(prompts.text_embeddings, prompts.text_mask)
        dense = self.dense(_dense_features(self.cells, boxes, points))
        use = use.to(dense.dtype)
        dense = use * dense + (1.0 - use) * self.no_dense.to(dense.dtype)
        return EncodedPrompts(torch.cat([spatial.to(dense.dtype), text.to(dense.dtype)], dim=-2), dense)


_DENSE_FEATURES = 10


def _dense_features(cells: Tensor, boxes: Tensor, points: Tensor) -> Tensor:
    """How each cell lies to box and point.

    cells f32[N, 2], boxes f32[..., K, 4], points f32[..., K, 2] -> f32[..., K, N, 10].
    """
    low, high = boxes[..., None, :2], boxes[..., None, 2:]
    past_low = torch.sigmoid(40.0 * (cells - low))
    past_high = torch.sigmoid(40.0 * (high - cells))
    relative = ((cells - 0.5 * (low + high)) / (high - low).clamp(min=0.02)).clamp(-1.5, 1.5)
    offset = ((cells - points[..., None, :]) * 10.0).clamp(-3.0, 3.0)
    near = torch.exp(-(offset * offset).sum(-1, keepdim=True))
    inside = (past_low * past_high).prod(-1, keepdim=True)
    return torch.cat([past_low, past_high, relative, offset, near, inside], dim=-1)
