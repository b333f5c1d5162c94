"""TensorRT-LLM at the turn level: each turn sends the whole conversation, whose blocks the engine reuses.

The constraint goes along as a regular expression. Either in this process through the LLM API, or over
``trtllm-serve`` where ``PPCR_TENSORRT_LLM_URL`` names one (the runtime then needs nothing of TensorRT-LLM).
Both take the package that ``export/tensorrt_llm_package.py`` writes. The segmenter runs on onnxruntime.
Written against TensorRT-LLM's sources, as `tests/signatures` records them; built, but not executed.
"""

from __future__ import annotations

import base64
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ppcr.constraint import Constraint
from ppcr.errors import BundleError, EngineError
from ppcr.prompts import IM_END, IM_START, IMAGE_PAD, VISION_END, VISION_START
from ppcr.tokenizer import PromptTokenizer
from runtime.bundle import Bundle
from runtime.generation import Turn
from runtime.session import Float32Array, Sessions

URL_VARIABLE = "PPCR_TENSORRT_LLM_URL"
PACKAGE = "tensorrt_llm"
_EXPORT = "python export/tensorrt_llm_package.py"
_TIMEOUT = 300
Meanwhile = Callable[[], None] | None


class Client(Protocol):
    """Something that completes a conversation about one image."""

    def complete(
        self, text: str, image: Image.Image, regex: str, max_tokens: int, meanwhile: Meanwhile
    ) -> tuple[str, int]:
        """The answer to ``text`` (one image pad in it) as text, and how many tokens were reused."""
        ...


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


class LibraryClient:
    """TensorRT-LLM's LLM API, in this process."""

    def __init__(self, model: str, max_length: int) -> None:
        try:
            import tensorrt_llm
            from tensorrt_llm import llmapi
        except Exception as error:  # without its libraries or a driver it fails in many ways
            told = f"TensorRT-LLM cannot be used here ({error})"
            raise EngineError(f"{told}: install it from NVIDIA, or name a server in {URL_VARIABLE}") from None
        self._library = tensorrt_llm
        self._guide = llmapi.GuidedDecodingParams
        self._llm = tensorrt_llm.LLM(
            model=model,
            kv_cache_config=llmapi.KvCacheConfig(enable_block_reuse=True, enable_partial_reuse=True),
            cuda_graph_config=llmapi.CudaGraphConfig(max_batch_size=1),
            guided_decoding_backend="xgrammar",
            max_batch_size=1,
            max_seq_len=max_length,
        )

    def complete(
        self, text: str, image: Image.Image, regex: str, max_tokens: int, meanwhile: Meanwhile
    ) -> tuple[str, int]:
        params = self._library.SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            guided_decoding=self._guide(regex=regex),
            add_special_tokens=False,
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
        )
        inputs = {"prompt": text, "multi_modal_data": {"image": [image]}}
        waiting = self._llm.generate_async(inputs, sampling_params=params)
        if meanwhile is not None:
            meanwhile()
        result = waiting.result()
        return str(result.outputs[0].text), int(getattr(result, "cached_tokens", 0))


class ServerClient:
    """An OpenAI-compatible server of TensorRT-LLM (``trtllm-serve``), over HTTP."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._model = str(self._call("/v1/models", None)["data"][0]["id"])

    def complete(
        self, text: str, image: Image.Image, regex: str, max_tokens: int, meanwhile: Meanwhile
    ) -> tuple[str, int]:
        if meanwhile is not None:
            meanwhile()
        answer = self._call("/v1/chat/completions", request(self._model, text, image, regex, max_tokens))
        details = answer["usage"].get("prompt_tokens_details") or {}
        return str(answer["choices"][0]["message"]["content"]), int(details.get("cached_tokens", 0))

    def _call(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(self._url + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(asked, timeout=_TIMEOUT) as response:
                answer: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(500).decode(errors="replace").split())
            raise EngineError(f"the server at {self._url} refused {path} ({error.code}): {said}") from None
        except (OSError, ValueError) as error:
            told = f"the server at {self._url} does not answer {path} ({error})"
            raise EngineError(f"{told}: start it as {PACKAGE}/README.md of the bundle says") from None
        return answer


def request(model: str, text: str, image: Image.Image, regex: str, max_tokens: int) -> dict[str, Any]:
    """The body of a chat completion; only fields that the recorded request has."""
    return {
        "model": model,
        "messages": messages(text, image),
        "max_completion_tokens": max_tokens,
        "temperature": 0.0,
        "response_format": {"type": "regex", "regex": regex},
        "add_special_tokens": False,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }


def messages(text: str, image: Image.Image) -> list[dict[str, Any]]:
    """A conversation's text as chat messages, the image in the place of its pad.

    The last turn, which opens the answer, is left out: the server's template adds it.
    """
    found: list[dict[str, Any]] = []
    for turn in text.split(IM_START)[1:]:
        role, _, content = turn.partition("\n")
        content, ended, _ = content.partition(IM_END)
        if not ended:
            break
        before, shown, after = content.partition(f"{VISION_START}{IMAGE_PAD}{VISION_END}")
        if shown:
            parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}]
            found.append({"role": role, "content": [*parts, {"type": "text", "text": before + after}]})
        else:
            found.append({"role": role, "content": content})
    return found


def data_url(image: Image.Image) -> str:
    """The image as a PNG in a data URL: not a bit of it is lost."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


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
    ) -> Turn:
        """Send the conversation with ``prompt`` at its end; the answer, checked against ``constraint``.

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
        text, reused = self._client.complete(
            self._text(),
            self._image,
            constraint.regex(self._tokenizer.decode),
            constraint.max_tokens + 1,  # and the end of the turn
            meanwhile,
        )
        tokens = fit(self._tokenizer.encode(text), constraint, text)
        return Turn(tokens, tokens, len(tokens), len(prompt), reused)

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
