"""The two systems that accuracy is measured of, behind one face: a bundle's engine, and the torch reference.

A *view* looks at one image: it answers expressions, and it draws masks from prompts of which one may be left
out, which is what the ablation asks for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from ppcr import masks
from ppcr.config import PPCRConfig
from ppcr.framing import Framing
from ppcr.patches import image_patches, nearest_size
from ppcr.prompts import SemanticPrompt, SpatialPrompt
from ppcr.tensors import RowTable
from ppcr.tokenizer import PromptTokenizer
from runtime.pipeline import Pipeline
from runtime.session import Features, Prompts

if TYPE_CHECKING:
    from ppcr.model.reference import ReferencePipeline

BoolMask = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]
UInt8Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Answer:
    """Both prompts of an expression, and the whole mask bool [H, W]."""

    semantic: SemanticPrompt
    spatial: SpatialPrompt
    mask: BoolMask


class View(Protocol):
    """One image, looked at."""

    def answer(self, expression: str, semantic: SemanticPrompt | None = None) -> Answer:
        """What ``expression`` names; a given semantic prompt stands for stage 1."""
        ...

    def draw(self, semantic: SemanticPrompt | None, spatial: SpatialPrompt | None) -> BoolMask:
        """The whole mask bool [H, W] from prompts; without a spatial prompt, one mask by text alone."""
        ...


class System(Protocol):
    """Something that looks at images."""

    @property
    def name(self) -> str: ...

    def look(self, image: UInt8Image) -> View: ...


class Engine:
    """A bundle on its engine."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    @property
    def name(self) -> str:
        told = self.pipeline.engine
        return f"{told['bundle']}, {told['engine']} {told['precision']}, threads: {told['threads']}"

    def look(self, image: UInt8Image) -> EngineView:
        return EngineView(self.pipeline, image)


class EngineView:
    """`View` of a bundle's engine."""

    def __init__(self, pipeline: Pipeline, image: UInt8Image) -> None:
        self._pipeline, self._framing = pipeline, framing_of(image, pipeline.bundle.config)
        self._pixels = self._framing.pixels(image)
        self._features: Features | None = None
        self._scene = pipeline.open(image)

    def answer(self, expression: str, semantic: SemanticPrompt | None = None) -> Answer:
        result = self._scene.segment(expression, semantic=semantic)
        return Answer(result.semantic, result.spatial, result.mask)

    def draw(self, semantic: SemanticPrompt | None, spatial: SpatialPrompt | None) -> BoolMask:
        bundle, segmenter = self._pipeline.bundle, self._pipeline.sessions.segmenter
        prompts = segmenter_prompts(
            semantic, spatial, bundle.tokenizer, bundle.embedding, bundle.manifest.shapes.max_text
        )
        if self._features is None:
            self._features = segmenter.encode(self._pixels)
        return whole(segmenter.decode(self._features, placed(prompts, self._framing))[0], self._framing)


class Reference:
    """The torch reference of a checkpoint."""

    def __init__(self, pipeline: ReferencePipeline) -> None:
        self.pipeline = pipeline

    @classmethod
    def load(cls, checkpoint: Path) -> Reference:
        """Raises CheckpointError: missing, incomplete or of another version."""
        from ppcr.model.reference import ReferencePipeline

        return cls(ReferencePipeline.load(checkpoint))

    @property
    def name(self) -> str:
        return f"{self.pipeline.config.name}, torch reference fp32"

    def look(self, image: UInt8Image) -> ReferenceView:
        return ReferenceView(self.pipeline, image)


class ReferenceView:
    """`View` of the torch reference. Keeps nothing between calls, as the reference does not."""

    def __init__(self, pipeline: ReferencePipeline, image: UInt8Image) -> None:
        self._pipeline, self._image = pipeline, image

    def answer(self, expression: str, semantic: SemanticPrompt | None = None) -> Answer:
        if semantic is None:
            result = self._pipeline.segment(self._image, expression)
            return Answer(result.semantic, result.spatial, result.mask)
        spatial = self._locate(expression, semantic)
        return Answer(semantic, spatial, self.draw(semantic, spatial))

    def draw(self, semantic: SemanticPrompt | None, spatial: SpatialPrompt | None) -> BoolMask:
        import torch

        pipeline = self._pipeline
        framing = framing_of(self._image, pipeline.config)
        table = pipeline.mllm.get_input_embeddings().weight.detach().cpu().numpy()
        prompts = segmenter_prompts(
            semantic, spatial, pipeline.tokenizer, table, pipeline.segmenter.config.max_text
        )
        prompts = placed(prompts, framing)
        pixels = framing.pixels(self._image)[None]
        arrays = (
            prompts.boxes,
            prompts.points,
            prompts.spatial_valid,
            prompts.text_embeddings,
            prompts.text_mask,
        )
        with torch.inference_mode():
            features = pipeline.segmenter.encode(torch.from_numpy(pixels).to(pipeline.device))
            given = (torch.from_numpy(array).to(pipeline.device) for array in arrays)
            logits, _ = pipeline.segmenter.decode(features, *given)  # type: ignore[arg-type]
        return whole(logits.cpu().numpy(), framing)

    def _locate(self, expression: str, semantic: SemanticPrompt) -> SpatialPrompt:
        import torch

        pipeline, tokenizer, config = self._pipeline, self._pipeline.tokenizer, self._pipeline.config.mllm
        size = nearest_size((self._image.shape[0], self._image.shape[1]), config.sizes)
        patches = torch.from_numpy(image_patches(self._image, size, config))
        rows, columns = config.grid_of(size)
        asked = [
            *tokenizer.prefix(rows * columns),
            *tokenizer.expression(expression, max_tokens=config.max_expression_tokens),
            *tokenizer.encode(semantic.text),
            *tokenizer.between_stages,
        ]
        constraint = tokenizer.spatial_constraint(semantic.count)
        with torch.inference_mode():
            found = pipeline.generate(asked, patches.to(pipeline.device), constraint, size=size)
        return tokenizer.spatial(found, size).distinct()


def segmenter_prompts(
    semantic: SemanticPrompt | None,
    spatial: SpatialPrompt | None,
    tokenizer: PromptTokenizer,
    table: Float32Array | RowTable,
    max_text: int,
) -> Prompts:
    """Arrays of one expression's prompts, either left out where it is None.

    table: f32 [vocabulary, hidden], the MLLM's input embedding.
    """
    count = 1 if spatial is None else spatial.count
    ids = [] if semantic is None else tokenizer.encode(semantic.text)[:max_text]
    # A text of no token at all is an array without a column: one masked column instead.
    text = np.zeros((max(1, len(ids)), table.shape[1]), np.float32)
    text[: len(ids)] = table[ids]
    return Prompts(
        boxes=np.zeros((count, 4), np.float32) if spatial is None else spatial.boxes,
        points=np.zeros((count, 2), np.float32) if spatial is None else spatial.points,
        spatial_valid=np.full(count, spatial is not None, np.float32),
        text_embeddings=np.repeat(text[None], count, axis=0),
        text_mask=np.full((count, len(text)), semantic is not None, np.bool_),
    )


def framing_of(image: UInt8Image, config: PPCRConfig) -> Framing:
    """Where an image uint8 [H, W, 3] lies in the segmenter's input."""
    return Framing.of((image.shape[0], image.shape[1]), config.segmenter)


def placed(prompts: Prompts, framing: Framing) -> Prompts:
    """The same prompts, boxes and points moved from 0..1 of the image to 0..1 of the segmenter's input."""
    return replace(prompts, boxes=framing.place(prompts.boxes), points=framing.place(prompts.points))


def whole(logits: Float32Array, framing: Framing) -> BoolMask:
    """Mask logits f32 [K, h, w] of all instances to one bool [H, W] at the image's size."""
    return masks.union(np.stack([framing.mask(one) for one in logits]))
