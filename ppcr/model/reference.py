"""The whole method in plain torch: what every exported engine is held to, and what benchmarks compare with.

Stages 1 and 2 are two calls of Hugging Face's ``generate``, each of which reads the whole conversation, image
included: nothing is shared between them. Preprocessing is that of the runtime (``ppcr.images``).
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ppcr import images, masks
from ppcr.checkpoint import Checkpoint
from ppcr.config import PPCRConfig
from ppcr.constraint import Constraint
from ppcr.errors import BundleError, CheckpointError
from ppcr.framing import Framing
from ppcr.model.checkpoint import load_mllm
from ppcr.model.segmenters import AnyFeatures, AnySegmenter, load_segmenter
from ppcr.patches import image_patches, nearest_size
from ppcr.prompts import SemanticPrompt, SpatialPrompt
from ppcr.tokenizer import PromptTokenizer
from ppcr.zero_shot import tokenizer_of

BoolMask = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ReferenceResult:
    """What the reference answers to one expression.

    Attributes:
        semantic_ids, spatial_ids: tokens of both stages, as generated; the second empty for "none".
        semantic, spatial: the prompts in them.
        mask_logits: f32 [K, h, w], above 0: foreground; scores: f32 [K] in 0..1.
        instances: bool [K, H, W], one mask per box at the image's size.
        seconds: wall time of "semantic", "spatial", "encoder", "decoder" and "masks", and of preprocessing
            in "image".
    """

    semantic_ids: tuple[int, ...]
    spatial_ids: tuple[int, ...]
    semantic: SemanticPrompt
    spatial: SpatialPrompt
    mask_logits: Float32Array
    scores: Float32Array
    instances: BoolMask
    seconds: dict[str, float]

    @property
    def mask(self) -> BoolMask:
        """bool [H, W]: the union of all instances."""
        return masks.union(self.instances)


@dataclass
class _Clock:
    on_gpu: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.on_gpu:  # what is queued belongs to the stage that queued it
            torch.cuda.synchronize()
        self.seconds[name] = time.perf_counter() - start


class _Held(StoppingCriteria):
    """Holds ``generate`` to a constraint: names the allowed tokens, and ends a complete answer."""

    def __init__(self, constraint: Constraint, prompt_length: int) -> None:
        self.cursor, self.read = constraint.start(), prompt_length

    def allowed(self, _: int, ids: Tensor) -> list[int]:
        self._follow(ids)
        return self.cursor.allowed().tolist()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        self._follow(input_ids[0])
        return torch.tensor([self.cursor.done], device=input_ids.device)

    def _follow(self, ids: Tensor) -> None:
        for token in ids[self.read :].tolist():
            self.cursor.advance(token)
        self.read = len(ids)


class ReferencePipeline:
    """Image and expression to masks in torch. Make one with `ReferencePipeline.load`.

    Args:
        config: sizes and normalisation. tokenizer: of the MLLM.
        mllm, segmenter: in evaluation mode, float32, on one device.
    """

    def __init__(
        self,
        config: PPCRConfig,
        tokenizer: PromptTokenizer,
        mllm: Any,
        segmenter: AnySegmenter,
    ) -> None:
        self.config, self.tokenizer, self.mllm, self.segmenter = config, tokenizer, mllm, segmenter
        self.device = next(segmenter.parameters()).device
        # transformers 5 asks which tokens are the image's; 4.57 finds out by itself.
        self._takes_kinds = "mm_token_type_ids" in inspect.signature(mllm.forward).parameters

    @classmethod
    def load(
        cls, checkpoint: Checkpoint | Path | None = None, *, device: torch.device | str = "cpu"
    ) -> ReferencePipeline:
        """Read a checkpoint (default: the shipped one) as float32.

        Raises:
            CheckpointError: missing, incomplete or of another version.
        """
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint.open(checkpoint)
        try:
            tokenizer = tokenizer_of(checkpoint.config, checkpoint.tokenizer)
            segmenter = load_segmenter(checkpoint.segmenter)
        except (BundleError, OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"cannot read the checkpoint {checkpoint.root}: {error}") from None
        mllm = load_mllm(checkpoint.mllm)
        return cls(checkpoint.config, tokenizer, mllm.to(device), segmenter.to(device))

    @torch.inference_mode()
    def segment(self, image: images.UInt8Image, expression: str) -> ReferenceResult:
        """All three stages for ``image`` uint8 [H, W, 3] RGB.

        Raises:
            ExpressionError: empty or too long.
        """
        clock, tokenizer, config = _Clock(self.device.type == "cuda"), self.tokenizer, self.config.mllm
        question = tokenizer.expression(expression, max_tokens=config.max_expression_tokens)
        size = nearest_size((image.shape[0], image.shape[1]), config.sizes)
        framing = Framing.of((image.shape[0], image.shape[1]), self.config.segmenter)
        with clock.stage("image"):
            patches, pixels = self._inputs(image, size, framing)
        rows, columns = config.grid_of(size)
        asked = [*tokenizer.prefix(rows * columns), *question]
        with clock.stage("semantic"):
            semantic_ids = self.generate(asked, patches, tokenizer.semantic_constraint, size=size)
        semantic = tokenizer.semantic(semantic_ids)
        if semantic.is_none:
            return _nothing(semantic_ids, semantic, image, self.segmenter.config.mask_size, clock.seconds)
        asked = [*asked, *semantic_ids, *tokenizer.between_stages]
        with clock.stage("spatial"):
            spatial_ids = self.generate(
                asked, patches, tokenizer.spatial_constraint(semantic.count), size=size
            )
        spatial = tokenizer.spatial(spatial_ids, size).distinct()
        with clock.stage("encoder"):
            features = self.segmenter.encode(pixels)
        with clock.stage("decoder"):
            logits, scores = self.decode(features, semantic, spatial, framing)
        with clock.stage("masks"):
            instances = np.stack([framing.mask(one) for one in logits])
        ids = tuple(semantic_ids), tuple(spatial_ids)
        return ReferenceResult(*ids, semantic, spatial, logits, scores, instances, clock.seconds)

    def generate(
        self,
        ids: Sequence[int],
        patches: Tensor,
        constraint: Constraint,
        *,
        size: tuple[int, int] | None = None,
    ) -> list[int]:
        """The most likely answer to a whole conversation that ``constraint`` allows.

        ids: every token so far; patches: f32 [patches, patch_dim] of the one image in them, ``size`` high and
        wide (default: the configuration's ``image_size``).
        """
        height, width = size or self.config.mllm.image_size
        patch = self.config.mllm.patch
        prompt = torch.tensor([list(ids)], device=self.device)
        held = _Held(constraint, prompt.shape[1])
        extra = {}
        if self._takes_kinds:
            extra["mm_token_type_ids"] = (prompt == self.tokenizer.image_token).long()
        output = self.mllm.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pixel_values=patches,
            image_grid_thw=torch.tensor([[1, height // patch, width // patch]], device=self.device),
            max_new_tokens=constraint.max_tokens,
            do_sample=False,
            prefix_allowed_tokens_fn=held.allowed,
            stopping_criteria=StoppingCriteriaList([held]),
            **extra,
        )
        answer: list[int] = output[0, prompt.shape[1] :].tolist()
        return answer

    def decode(
        self, features: AnyFeatures, semantic: SemanticPrompt, spatial: SpatialPrompt, framing: Framing
    ) -> tuple[Float32Array, Float32Array]:
        """Mask logits f32 [K, h, w] and scores f32 [K] of one expression's instances."""
        ids = self.tokenizer.encode(semantic.text)[: self.segmenter.config.max_text]
        table = self.mllm.get_input_embeddings().weight
        text = table[torch.tensor(ids, device=self.device)].expand(spatial.count, -1, -1)
        logits, scores = self.segmenter.decode(
            features,  # type: ignore[arg-type]  # a segmenter's own, by construction
            torch.from_numpy(framing.place(spatial.boxes)).to(self.device),
            torch.from_numpy(framing.place(spatial.points)).to(self.device),
            torch.ones(spatial.count, device=self.device),
            text,
            torch.ones(text.shape[:2], dtype=torch.bool, device=self.device),
        )
        return logits.cpu().numpy(), scores.cpu().numpy()

    def _inputs(
        self, image: images.UInt8Image, size: tuple[int, int], framing: Framing
    ) -> tuple[Tensor, Tensor]:
        """Patches of the MLLM and pixels [1, 3, S, S] of the segmenter."""
        patches = image_patches(image, size, self.config.mllm)
        whole = framing.pixels(image)
        return torch.from_numpy(patches).to(self.device), torch.from_numpy(whole)[None].to(self.device)


def _nothing(
    ids: Sequence[int],
    semantic: SemanticPrompt,
    image: images.UInt8Image,
    mask_size: int,
    seconds: dict[str, float],
) -> ReferenceResult:
    logits = np.zeros((0, mask_size, mask_size), np.float32)
    instances = np.zeros((0, *image.shape[:2]), np.bool_)
    scores = np.zeros(0, np.float32)
    spatial = SpatialPrompt.empty()
    return ReferenceResult(tuple(ids), (), semantic, spatial, logits, scores, instances, seconds)
