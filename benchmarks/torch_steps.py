"""Eager torch as the first steps of the waterfall: the plain pipeline, and the same modules behind sessions.

The plain pipeline is `ppcr.model.reference`. Behind the session contract the same modules keep one growing
cache for both turns and every expression; whether forced tokens are fed in blocks or one by one is the
context's choice. On a GPU all of them compute in bfloat16, on a CPU in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache

from ppcr.constraint import Constraint
from ppcr.errors import EngineError, UsageError
from ppcr.model.reference import ReferencePipeline, ReferenceResult
from ppcr.model.segmenters import AnyFeatures, AnySegmenter
from runtime.bundle import Bundle
from runtime.generation import Turn, best
from runtime.pipeline import Pipeline
from runtime.positions import positions
from runtime.session import Float32Array, Prompts, Sessions

EAGER = "torch eager"
_DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Cast:
    """A segmenter in another floating type: what goes in is cast, logits and scores come out as float32."""

    def __init__(self, segmenter: AnySegmenter, dtype: torch.dtype) -> None:
        self._segmenter, self._dtype, self.config = segmenter.to(dtype), dtype, segmenter.config

    def encode(self, pixels: Tensor) -> AnyFeatures:
        return self._segmenter.encode(pixels.to(self._dtype))

    def decode(self, features: Any, *prompts: Tensor) -> tuple[Tensor, Tensor]:
        given = [part.to(self._dtype) if part.is_floating_point() else part for part in prompts]
        logits, scores = self._segmenter.decode(features, *given)  # type: ignore[call-arg]
        return logits.float(), scores.float()


@dataclass(frozen=True)
class PlainView:
    """One image for the plain pipeline, which keeps nothing of it."""

    pipeline: ReferencePipeline
    image: npt.NDArray[np.uint8]

    def segment(self, expression: str) -> ReferenceResult:
        return self.pipeline.segment(self.image, expression)

    def segment_many(self, expressions: Sequence[str]) -> list[ReferenceResult]:
        return [self.segment(expression) for expression in expressions]


def plain_pipeline(checkpoint: Path, *, threads: int, device: str = "cpu") -> ReferencePipeline:
    """The reference of a checkpoint on a device.

    Raises:
        CheckpointError: as `ReferencePipeline.load`. EngineError: this torch cannot use a GPU.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise EngineError("this torch finds no GPU: install its CUDA build, or leave it out: --without-torch")
    torch.set_num_threads(threads)
    reference = ReferencePipeline.load(checkpoint, device=device)
    return cast(reference, _DTYPES[device])


def cast(reference: ReferencePipeline, dtype: torch.dtype) -> ReferencePipeline:
    """``reference`` with both models in ``dtype``; float32 leaves it as it is."""
    if dtype != torch.float32:
        # transformers casts the MLLM's patches by itself.
        reference.mllm.to(dtype)
        reference.segmenter = Cast(reference.segmenter, dtype)  # type: ignore[assignment]
    return reference


def precision_of(reference: ReferencePipeline) -> str:
    """The name of the type that the MLLM computes in."""
    return _NAMES[reference.mllm.dtype]


def eager_pipeline(
    bundle: Path, checkpoint: Path, *, threads: int, device: str = "cpu", forced: bool = True
) -> Pipeline:
    """The runtime's pipeline over eager torch modules: the checkpoint's weights, all else the bundle's.

    forced: whether tokens that a constraint forces are fed in blocks. The encoder never runs beside the MLLM.

    Raises:
        UsageError: the MLLM is of a family that this does not speak to.
    """
    held = Bundle.load(bundle)
    if held.config.mllm.family != "qwen2_5_vl":
        raise UsageError(f"the waterfall's torch steps know qwen2_5_vl, not {held.config.mllm.family}")
    reference = plain_pipeline(checkpoint, threads=threads, device=device)
    mllm = TorchMLLM(reference, held, forced=forced)
    sessions = Sessions(mllm, TorchSegmenter(reference), precision_of(reference))
    pipeline = Pipeline(held, sessions, threads=threads, engine=EAGER)
    pipeline.background = None
    return pipeline


class TorchMLLM:
    """`runtime.session.MLLMSession` on eager torch."""

    def __init__(self, reference: ReferencePipeline, bundle: Bundle, *, forced: bool) -> None:
        self.reference, self.config, self._forced = reference, bundle.config.mllm, forced
        self.most = bundle.manifest.shapes.max_length
        self.image_start = len(bundle.tokenizer.before_image)

    @torch.inference_mode()
    def encode_image(self, patches: Float32Array, *, size: tuple[int, int] | None = None) -> Tensor:
        """Patches f32 [patches, patch_dim] to features [image_tokens, hidden] on the device."""
        reference, patch = self.reference, self.config.patch
        height, width = size or self.config.image_size
        grid = torch.tensor([[1, height // patch, width // patch]], device=reference.device)
        given = torch.from_numpy(patches).to(reference.device, reference.mllm.dtype)
        found = reference.mllm.model.visual(given, grid_thw=grid)
        # transformers 4.57 answers with the features themselves.
        features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
        return features

    def open(
        self,
        max_length: int | None = None,
        *,
        prefix: Sequence[int] = (),
        size: tuple[int, int] | None = None,
    ) -> TorchContext:
        """A conversation with a cache that grows; nothing of ``prefix`` is kept for further ones."""
        grid = self.config.grid_of(size or self.config.image_size)
        places = torch.from_numpy(positions(self.most, self.image_start, grid)).to(self.reference.device)
        context = (TorchContext if self._forced else OneByOne)(self.reference, places)
        if prefix:
            context.extend(prefix)
        return context


class TorchContext:
    """`runtime.session.Context` over Hugging Face's growing cache. places: int64 [3, capacity]."""

    def __init__(self, reference: ReferencePipeline, places: Tensor) -> None:
        self._reference, self._places = reference, places
        self._mllm = reference.mllm
        self._cache = DynamicCache(config=self._mllm.config.text_config)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self._cache.get_seq_length())

    @property
    def capacity(self) -> int:
        """Tokens the cache can hold."""
        return int(self._places.shape[1])

    def truncate(self, length: int) -> None:
        """Forget everything from position ``length`` on."""
        if length < self.length:
            self._cache.crop(length - self.length)

    @torch.inference_mode()
    def extend(self, token_ids: Sequence[int], features: Tensor | None = None) -> Float32Array:
        """Run a block; logits f32 [vocabulary] after its last token."""
        start = self.length
        ids = torch.tensor([list(token_ids)], device=self._places.device)
        embeds = self._mllm.get_input_embeddings()(ids)
        if features is not None:
            embeds = embeds.clone()
            embeds[ids == self._reference.tokenizer.image_token] = features.to(embeds.dtype)
        hidden = self._mllm.model.language_model(
            inputs_embeds=embeds,
            position_ids=self._places[:, None, start : start + len(token_ids)],
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        logits: Float32Array = self._mllm.lm_head(hidden[0, -1]).float().cpu().numpy()
        return logits


class OneByOne(TorchContext):
    """The same, with every token of an answer decided by a step of its own, forced or not."""

    def answer(
        self,
        prompt: Sequence[int],
        constraint: Constraint,
        *,
        features: Tensor | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Turn:
        """`runtime.session.TurnContext`: nothing runs ``meanwhile``."""
        reused, cursor = self.length, constraint.start()
        pending, tokens, calls = list(prompt), list[int](), 0
        while not cursor.done:
            logits = self.extend(pending, features)
            calls, features = calls + 1, None
            token = best(logits, cursor.allowed())
            cursor.advance(token)
            tokens.append(token)
            pending = [token]
        return Turn(tuple(tokens), tuple(pending), calls, reused, self.length)


class TorchSegmenter:
    """`runtime.session.SegmenterSession` on eager torch."""

    def __init__(self, reference: ReferencePipeline) -> None:
        self._reference = reference

    @torch.inference_mode()
    def encode(self, pixels: Float32Array) -> Any:
        """Pixels f32 [3, H, W] to the features of one image, on the device."""
        reference = self._reference
        return reference.segmenter.encode(self._given(pixels)[None])

    @torch.inference_mode()
    def decode(self, features: Any, prompts: Prompts) -> tuple[Float32Array, Float32Array]:
        """Mask logits f32 [N, h, w] and scores f32 [N]."""
        given = (self._given(part) for part in vars(prompts).values())
        logits, scores = self._reference.segmenter.decode(features, *given)  # type: ignore[call-arg]
        return logits.cpu().numpy(), scores.cpu().numpy()

    def _given(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._reference.device)
