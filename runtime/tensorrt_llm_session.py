"""TensorRT-LLM at the turn level: each turn sends the whole conversation, whose blocks the engine reuses.

The constraint goes along as a regular expression. Either in this process through the LLM API, or over
``trtllm-serve`` where ``PPCR_TENSORRT_LLM_URL`` names one (the runtime then needs nothing of TensorRT-LLM).
Both take the package that ``export/tensorrt_llm_package.py`` writes. The segmenter runs on onnxruntime.
Built, tested without TensorRT-LLM, but not executed with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from ppcr.constraint import Constraint
from ppcr.errors import BundleError, EngineError
from ppcr.tokenizer import PromptTokenizer
from runtime.bundle import Bundle
from runtime.generation import Turn
from runtime.session import Float32Array, Sessions
from runtime.tensorrt_llm_clients import (
    PACKAGE,
    URL_VARIABLE,
    Client,
    LibraryClient,
    Meanwhile,
    ServerClient,
)

_EXPORT = "python export/tensorrt_llm_package.py"


def load(bundle: Bundle, *, threads: int) -> Sessions:
    """Both sessions of a bundle with a TensorRT-LLM package.

    Raises:
        BundleError: it has none. EngineError: TensorRT-LLM is not installed, or the server does not answer.
    """
    from runtime.onnxruntime_session import load_segmenter

    model = bundle.folder / PACKAGE / "model"
    url = os.environ.get(URL_VARIABLE)
    if url:
        client: Client = ServerClient(url)
    elif not (model / "config.json").is_file():
        raise BundleError(f"this bundle has no TensorRT-LLM package: write it with: {_EXPORT}")
    else:
        client = LibraryClient(str(model), bundle.manifest.shapes.max_length)
    return Sessions(TurnMLLM(client, bundle), load_segmenter(bundle, threads=threads))


class TurnMLLM:
    """`runtime.session.MLLMSession` whose contexts answer whole turns. Threads may share it."""

    def __init__(self, client: Client, bundle: Bundle) -> None:
        self._client, self._bundle = client, bundle

    def encode_image(self, patches: Float32Array, *, size: tuple[int, int] | None = None) -> Image.Image:
        """The image that ``patches`` were cut from: the engine's own processor cuts it again."""
        config = self._bundle.config.mllm
        height, width = size or config.image_size
        unit, merge = config.patch * config.merge, config.merge
        shape = (height // unit, width // unit, merge, merge, 3, config.temporal, config.patch, config.patch)
        grid = patches.reshape(shape)[:, :, :, :, :, 0]
        pixels = grid.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height, width, 3)
        colours = (pixels * np.asarray(config.std) + np.asarray(config.mean)) * 255
        return Image.fromarray(np.rint(colours).clip(0, 255).astype(np.uint8))

    def open(
        self,
        max_length: int | None = None,
        *,
        prefix: Sequence[int] = (),
        size: tuple[int, int] | None = None,
    ) -> TurnContext:
        """A conversation that begins with ``prefix``. What is computed for it is kept by the engine."""
        most = self._bundle.manifest.shapes.max_length
        if max_length is not None and not 0 < max_length <= most:
            raise ValueError(f"a context of {max_length} tokens: this bundle's model holds 1 to {most}")
        return TurnContext(self._client, self._bundle.tokenizer, most, list(prefix))


class TurnContext:
    """`runtime.session.TurnContext`: the tokens of a conversation, and the image they speak of."""

    def __init__(self, client: Client, tokenizer: PromptTokenizer, capacity: int, tokens: list[int]) -> None:
        self._client, self._tokenizer, self.capacity = client, tokenizer, capacity
        self._tokens = tokens
        self._image: Image.Image | None = None

    @property
    def length(self) -> int:
        """Tokens of the conversation so far."""
        return len(self._tokens)

    def truncate(self, length: int) -> None:
        """Forget everything from position ``length`` on."""
        if not 0 <= length <= len(self._tokens):
            raise ValueError(f"cannot truncate a context of {len(self._tokens)} tokens to {length}")
        del self._tokens[length:]

    def extend(self, token_ids: Sequence[int], features: Image.Image | None = None) -> Float32Array:
        """Not offered: this engine gives no logits, it answers whole turns (`answer`)."""
        raise EngineError("TensorRT-LLM answers whole turns, it does not give the logits of a block")

    def answer(
        self,
        prompt: Sequence[int],
        constraint: Constraint,
        *,
        features: Image.Image | None = None,
        meanwhile: Meanwhile = None,
        heard: Callable[[str], None] | None = None,
    ) -> Turn:
        """Send the conversation with ``prompt`` at its end; the answer, checked against ``constraint``.

        ``heard`` is told every piece of the answer as it comes, before the whole of it is checked.

        Raises:
            EngineError: the answer does not fit the constraint. ValueError: the conversation is too long.
        """
        if features is not None:
            self._image = features
        if self._image is None:
            raise ValueError("the first turn needs the image")
        if len(self._tokens) + len(prompt) + constraint.max_tokens > self.capacity:
            raise ValueError(f"the conversation does not fit a context of {self.capacity} tokens")
        self._tokens += prompt
        text, reused = "", 0
        for piece in self._client.stream(
            self._text(),
            self._image,
            constraint.regex(self._tokenizer.decode),
            constraint.max_tokens + 1,  # and the end of the turn
            meanwhile,
        ):
            text, reused = text + piece.text, max(reused, piece.reused)
            if heard is not None and piece.text:
                heard(piece.text)
        tokens = fit(self._tokenizer.encode(text), constraint, text)
        return Turn(tokens, tokens, len(tokens), reused, len(self._tokens))

    def _text(self) -> str:
        """The conversation, its run of image tokens as the one pad that the engine's processor repeats."""
        pad = self._tokenizer.image_token
        kept = [t for i, t in enumerate(self._tokens) if t != pad or i == 0 or self._tokens[i - 1] != pad]
        return self._tokenizer.decode(kept)


def fit(tokens: Sequence[int], constraint: Constraint, text: str) -> tuple[int, ...]:
    """The tokens of an answer up to its end, each checked. Raises EngineError when one is not allowed."""
    cursor = constraint.start()
    for count, token in enumerate(tokens):
        if cursor.done:
            return tuple(tokens[:count])
        try:
            cursor.advance(token)
        except ValueError:
            break
    if not cursor.done:
        told = f"TensorRT-LLM answered {text[:80]!r}, which does not fit the constraint"
        raise EngineError(f"{told}: is guided_decoding_backend set, as in {PACKAGE}/llm_args.yaml?")
    return tuple(tokens)
