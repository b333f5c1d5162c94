"""The card that the latency benchmark prints first: bytes of the weights, FLOPs of the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ppcr.manifest import EMBEDDING, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from ppcr.model.reference import ReferencePipeline

_TEXT = 12  # tokens of a usual semantic prompt


@dataclass(frozen=True)
class Conversation:
    """Mean lengths, in tokens, of the parts of a conversation: what precedes the expression (image included),
    the expression, stage 1's answer, what lies between the stages, stage 2's answer."""

    prefix: float
    expression: float
    semantic: float
    between: float
    spatial: float

    @classmethod
    def of(cls, pipeline: ReferencePipeline, texts: list[tuple[str, str, int]]) -> Conversation:
        """Of (expression, semantic prompt, number of targets) with their true answers."""
        tokenizer, config = pipeline.tokenizer, pipeline.config.mllm
        n = len(texts)
        return cls(
            prefix=len(tokenizer.prefix(config.image_tokens)),
            expression=sum(len(tokenizer.expression(text)) for text, _, _ in texts) / n,
            semantic=sum(len(tokenizer.encode(semantic)) for _, semantic, _ in texts) / n,
            between=len(tokenizer.between_stages),
            spatial=6 * sum(count for _, _, count in texts) / n,
        )

    @property
    def asked(self) -> float:
        """Tokens up to stage 1's answer."""
        return self.prefix + self.expression

    @property
    def first(self) -> float:
        """Tokens up to the end of stage 1."""
        return self.asked + self.semantic

    @property
    def whole(self) -> float:
        return self.first + self.between + self.spatial


def weights(manifest: Manifest, precision: str) -> dict[str, int]:
    """Bytes of each graph of a bundle (weights for the most part), and of the embedding table."""
    files = {**manifest.paths(precision), "embedding": EMBEDDING}
    return {role: manifest.files[name].bytes for role, name in files.items()}


def flops(pipeline: ReferencePipeline, talk: Conversation) -> dict[str, dict[str, float]]:
    """Least FLOPs of each stage: for the first expression of an image, a second one, and plain torch.

    A multiplication and an addition count as two. Vision tower and segmenter are counted operator by
    operator from their shapes; the MLLM's text part by the formula, with causal attention.
    """
    config, mask_text = pipeline.config, torch.ones(1, _TEXT, dtype=torch.bool)
    grid = torch.tensor([[1, *(n * config.mllm.merge for n in config.mllm.grid)]])
    patch = 3 * config.mllm.temporal * config.mllm.patch**2
    patches = torch.zeros(config.mllm.image_tokens * config.mllm.merge**2, patch)
    pixels = torch.zeros(1, 3, *config.segmenter.image_size)
    segmenter, text = pipeline.segmenter, torch.zeros(1, _TEXT, pipeline.segmenter.config.text_dim)
    # The counter follows modules by gradient hooks, which parameters passed as arguments would trip.
    pipeline.mllm.requires_grad_(False)
    segmenter.requires_grad_(False)
    with torch.no_grad():
        vision = counted(lambda: pipeline.mllm.model.visual(patches, grid_thw=grid))
        encoder = counted(lambda: segmenter.encode(pixels))
        features = segmenter.encode(pixels)
        prompts = torch.zeros(1, 4), torch.zeros(1, 2), torch.ones(1), text, mask_text
        decoder = counted(lambda: segmenter.decode(features, *prompts))  # type: ignore[arg-type]
    two = talk.whole - talk.first

    def read(start: float, count: float, answer: float) -> float:
        return text_flops(pipeline, start, count, answer)

    return {
        "vision": {"first": vision, "second": 0.0, "plain": 2 * vision},
        "semantic": {
            "first": read(0, talk.first, talk.semantic),
            "second": read(talk.prefix, talk.first - talk.prefix, talk.semantic),
            "plain": read(0, talk.first, talk.semantic),
        },
        "spatial": {
            "first": read(talk.first, two, talk.spatial),
            "second": read(talk.first, two, talk.spatial),
            "plain": read(0, talk.whole, talk.spatial),
        },
        "encoder": {"first": encoder, "second": 0.0, "plain": encoder},
        "decoder (one mask)": {"first": decoder, "second": decoder, "plain": decoder},
    }


def text_flops(pipeline: ReferencePipeline, start: float, count: float, answers: float) -> float:
    """Of ``count`` tokens read after ``start`` others, with logits for ``answers`` of them."""
    model = pipeline.mllm.model.language_model
    config = model.config
    matrices = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    width = config.hidden_size // config.num_attention_heads * config.num_attention_heads
    attended = count * start + count * (count + 1) / 2
    attention = 4.0 * config.num_hidden_layers * width * attended
    return 2.0 * matrices * count + attention + 2.0 * config.hidden_size * config.vocab_size * answers


def counted(body: Callable[[], object]) -> float:
    """FLOPs of ``body``, with attention written out so that it is counted too."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        body()
    return float(counter.get_total_flops())


def lines(manifest: Manifest, precisions: list[str], work: dict[str, dict[str, float]]) -> list[str]:
    """The card as text."""
    held = {precision: weights(manifest, precision) for precision in precisions}
    roles = list(held[precisions[0]])
    table = [f"{'weights, MB':<22}" + "".join(f"{name:>12}" for name in precisions)]
    for role in roles:
        table.append(f"  {role:<20}" + "".join(f"{held[p][role] / 1e6:>12.2f}" for p in precisions))
    table.append(f"  {'all':<20}" + "".join(f"{sum(held[p].values()) / 1e6:>12.2f}" for p in precisions))
    columns = ("first", "second", "plain")
    table.append(f"{'work, MFLOP':<22}" + "".join(f"{name:>12}" for name in columns))
    for stage, counts in work.items():
        table.append(f"  {stage:<20}" + "".join(f"{counts[name] / 1e6:>12.1f}" for name in columns))
    sums = (sum(counts[name] for counts in work.values()) for name in columns)
    table.append(f"  {'all':<20}" + "".join(f"{total / 1e6:>12.1f}" for total in sums))
    return table
