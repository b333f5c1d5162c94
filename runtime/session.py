"""What an engine must offer, and the registry that loads one by name.

Everything else in ``runtime`` is written against these protocols; each engine library is imported in its own
file, and only when a bundle is opened with it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ppcr.errors import EngineError, UsageError

if TYPE_CHECKING:
    from ppcr.constraint import Constraint
    from runtime.bundle import Bundle
    from runtime.generation import Turn

Float32Array = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

# Engine-specific image features: an array, or a handle to device memory. Only the session reads them.
Features = Any


class Context(Protocol):
    """One conversation of the MLLM: a KV cache and how much of it is filled. Not thread-safe."""

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        ...

    @property
    def capacity(self) -> int:
        """Tokens the cache can hold."""
        ...

    def extend(self, token_ids: Sequence[int], features: Features | None = None) -> Float32Array:
        """Run a block of any length and return the logits f32 [vocabulary] after its last token.

        ``features`` take the places of the image tokens in the block, in order. The array may be overwritten
        by the next call. Raises ValueError when the block does not fit, or image tokens and features differ.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget everything from position ``length`` on, at no cost."""
        ...


@runtime_checkable
class TurnContext(Protocol):
    """A conversation on an engine that answers whole turns and gives no logits (its `extend` is not used)."""

    def answer(
        self,
        prompt: Sequence[int],
        constraint: Constraint,
        *,
        features: Features | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Turn:
        """As `runtime.generation.generate` on this context."""
        ...


@runtime_checkable
class VerifyingContext(Protocol):
    """A conversation whose engine can say what comes after several tokens of a block: for drafts."""

    @property
    def can_verify(self) -> bool:
        """Whether the bundle's decoder allows it too."""
        ...

    def verify(
        self, token_ids: Sequence[int], guesses: int, features: Features | None = None
    ) -> Float32Array:
        """As `Context.extend`, with the logits f32 [1 + guesses, vocabulary] after the last of these tokens
        that is no guess, and after each of the ``guesses`` tokens that follow it to the end."""
        ...


class Branches(Protocol):
    """Conversations that go on side by side from what a context held when they began. Not thread-safe."""

    def length(self, branch: int) -> int:
        """Tokens of a branch, what all began with included."""
        ...

    def extend(
        self, parts: Mapping[int, Sequence[int]], guesses: Mapping[int, int] | None = None
    ) -> Float32Array:
        """Read on in some branches, text alone, in one forward call.

        parts: what each of these branches reads, by its number.
        guesses: of how many tokens at the end of its part a branch wants to know what comes after the one
            before them as well; 0 for those that are not named.

        Returns the logits f32 [sum of 1 + guesses, vocabulary] after the last token of each part, and after
        those before it that were asked for, in order; the next call may overwrite the array. Raises
        ValueError when a part is empty, holds an image token or does not fit.
        """
        ...

    def truncate(self, branch: int, length: int) -> None:
        """Forget everything of a branch from position ``length`` on. Raises ValueError inside the trunk."""
        ...


@runtime_checkable
class BranchingContext(Protocol):
    """A conversation whose engine can read for several at once. Others are read one after the other."""

    @property
    def can_branch(self) -> bool:
        """Whether the bundle's decoder allows it too."""
        ...

    def branch(self, count: int) -> Branches:
        """``count`` conversations that begin with what this one holds, which they do not change."""
        ...


class MLLMSession(Protocol):
    """The prompt MLLM on an engine. May be shared by threads."""

    def encode_image(self, patches: Float32Array, *, size: tuple[int, int] | None = None) -> Features:
        """Patches f32 [patches, patch_dim] (``ppcr.images.patchify``) to the features of one image.

        size: height and width in pixels, one of the bundle's; None: its first.
        """
        ...

    def open(
        self,
        max_length: int | None = None,
        *,
        prefix: Sequence[int] = (),
        size: tuple[int, int] | None = None,
    ) -> Context:
        """A conversation that begins with ``prefix`` (text), with a KV cache of its own.

        An image of ``size``, as `encode_image` has it, is to follow the prefix.

        The cache holds ``max_length`` tokens (default: the most) or more. What was computed for a prefix once
        may be copied for the conversations to come. Raises ValueError when that is too long or too short.
        """
        ...


@dataclass(frozen=True)
class Prompts:
    """N prompts of one image, of one expression or of several.

    Attributes:
        boxes: f32 [N, 4] xyxy in 0..1; points: f32 [N, 2] xy in 0..1.
        spatial_valid: f32 [N], 1 to use box and point, 0 to segment by text alone.
        text_embeddings: f32 [N, T, hidden]: rows of the MLLM's input embedding; text_mask: bool [N, T].
    """

    boxes: Float32Array
    points: Float32Array
    spatial_valid: Float32Array
    text_embeddings: Float32Array
    text_mask: BoolArray


class SegmenterSession(Protocol):
    """The segmenter on an engine. May be shared by threads."""

    def encode(self, pixels: Float32Array) -> Features:
        """Pixels f32 [3, H, W], normalised, to the features of one image."""
        ...

    def decode(self, features: Features, prompts: Prompts) -> tuple[Float32Array, Float32Array]:
        """Mask logits f32 [N, h, w] (above 0: foreground) and scores f32 [N] in 0..1."""
        ...


@dataclass(frozen=True)
class Sessions:
    """Both models of a bundle on one engine.

    Attributes:
        precision: what the engine computes in; "": that of the bundle's graphs.
        device: where: "cpu" or "cuda".
    """

    mllm: MLLMSession
    segmenter: SegmenterSession
    precision: str = ""
    device: str = "cpu"


BACKENDS: dict[str, str] = {
    "onnxruntime": "runtime.onnxruntime_session",
    "onnxruntime-cuda": "runtime.onnxruntime_cuda_session",
    "openvino": "runtime.openvino_session",
    "tensorrt": "runtime.tensorrt_session",
    "torch": "runtime.torch_session",
    "tensorrt_llm": "runtime.tensorrt_llm_session",
}
"""Engine name -> module with ``load(bundle, *, threads) -> Sessions``; some take options besides."""


def load_sessions(backend: str, bundle: Bundle, *, threads: int, **options: Any) -> Sessions:
    """Both sessions of ``bundle`` on the engine called ``backend``.

    options: what that engine's ``load`` takes besides.

    Raises:
        UsageError: no such engine. EngineError: it is not installed here or refuses the bundle.
    """
    if backend not in BACKENDS:
        raise UsageError(f"unknown engine {backend!r}; the engines are: {', '.join(BACKENDS)}")
    try:
        engine = importlib.import_module(BACKENDS[backend])
    except (ImportError, OSError, RuntimeError) as error:
        # Not installed, or a stub, or without libraries or a driver of its own.
        told = str(error).strip().splitlines()
        reason = told[0] if told else type(error).__name__
        raise EngineError(f"engine {backend!r} cannot be used here: {reason}; install it first") from error
    sessions: Sessions = engine.load(bundle, threads=threads, **options)
    return sessions
