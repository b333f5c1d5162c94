"""The card that the latency benchmark prints first: bytes of the weights, FLOPs of the work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ppcr.manifest import EMBEDDING, Manifest

if TYPE_CHECKING:
    from collections.abc import Callable

    from ppcr.checkpoint import Checkpoint
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

    @classmethod
    def held(cls, pipeline: ReferencePipeline, texts: list[tuple[str, str, int]]) -> Conversation:
        """The same where the tokenizer holds every answer to one length (`benchmarks.fixed_answers`)."""
        usual = cls.of(pipeline, texts)
        semantic = pipeline.tokenizer.semantic_constraint.max_tokens
        return replace(usual, semantic=semantic, spatial=pipeline.tokenizer.spatial_constraint(1).max_tokens)

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


def loaded(checkpoint: Checkpoint, texts: list[tuple[str, str, int]]) -> dict[str, dict[str, float]]:
    """`flops` of a checkpoint, read for it. texts: as `Conversation.of`."""
    # transformers takes seconds to import: only once everything else has been found in order.
    from ppcr.model.reference import ReferencePipeline

    pipeline = ReferencePipeline.load(checkpoint)
    return flops(pipeline, Conversation.of(pipeline, texts))


def sizes_alone(checkpoint: Checkpoint, texts: list[tuple[str, str, int]]) -> dict[str, dict[str, float]]:
    """`flops` of a checkpoint with answers of fixed lengths; of the MLLM no weight is read."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    from benchmarks.fixed_answers import fix_answers
    from ppcr.model.reference import ReferencePipeline
    from ppcr.model.segmenters import load_segmenter
    from ppcr.zero_shot import tokenizer_of

    with torch.device("meta"):
        mllm = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(checkpoint.mllm))
    tokenizer = tokenizer_of(checkpoint.config, checkpoint.tokenizer)
    fix_answers(tokenizer)
    segmenter = load_segmenter(checkpoint.segmenter)
    pipeline = ReferencePipeline(checkpoint.config, tokenizer, mllm, segmenter)
    return flops(pipeline, Conversation.held(pipeline, texts))


def flops(pipeline: ReferencePipeline, talk: Conversation) -> dict[str, dict[str, float]]:
    """Least FLOPs of each stage: for the first expression of an image, a second one, and plain torch.

    A multiplication and an addition count as two. The segmenter is counted operator by operator from its
    shapes; the MLLM by formulas, its text part with causal attention.
    """
    segmenter = pipeline.segmenter
    # The counter follows modules by gradient hooks, which parameters passed as arguments would trip.
    segmenter.requires_grad_(False)
    vision = vision_flops(pipeline)
    pixels = torch.zeros(1, 3, *pipeline.config.segmenter.image_size)
    text, mask_text = torch.zeros(1, _TEXT, segmenter.config.text_dim), torch.ones(1, _TEXT, dtype=torch.bool)
    prompts = torch.zeros(1, 4), torch.zeros(1, 2), torch.ones(1), text, mask_text
    features: list[Any] = []
    with torch.no_grad():
        encoder = counted(lambda: features.append(segmenter.encode(pixels)))
        decoder = counted(lambda: segmenter.decode(features[0], *prompts))
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


def vision_flops(pipeline: ReferencePipeline) -> float:
    """Of the vision tower on one image of the first size: products with weights, and attention.

    Qwen2.5-VL attends within windows in most blocks, which are whole at the sizes used here.
    """
    config, tower = pipeline.config.mllm, pipeline.mllm.model.visual
    patches = config.image_tokens * config.merge**2
    # The patches' embedding is a convolution over exactly one patch; the mergers see merged cells.
    embedding = tower.patch_embed.proj.weight.numel() * patches
    blocks = _matrices(tower.blocks) * patches
    mergers = [tower.merger, *getattr(tower, "deepstack_merger_list", ())]
    merged = sum(_matrices(part) for part in mergers) * config.image_tokens
    whole = range(len(tower.blocks))
    window, full = patches, set(whole)
    if (side := getattr(tower.config, "window_size", None)) is not None:
        window, full = (side // config.patch) ** 2, set(tower.config.fullatt_block_indexes)
    attended = sum(patches if block in full else min(window, patches) for block in whole) * patches
    return 2.0 * (embedding + blocks + merged) + 4.0 * tower.config.hidden_size * attended


def _matrices(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)


def text_flops(pipeline: ReferencePipeline, start: float, count: float, answers: float) -> float:
    """Of ``count`` tokens read after ``start`` others, with logits for ``answers`` of them."""
    model = pipeline.mllm.model.language_model
    config = model.config
    matrices = _matrices(model.layers)
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
