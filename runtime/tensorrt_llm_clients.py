"""Who completes a conversation for TensorRT-LLM's turns: its LLM API here, or its server over HTTP.

Both stream: the answer comes in pieces, and what `meanwhile` does runs beside the first of them. Written
against TensorRT-LLM's sources, as `tests/signatures` records them; not executed with TensorRT-LLM.
"""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, Protocol

from PIL import Image

from ppcr.errors import EngineError
from ppcr.prompts import IM_END, IM_START, IMAGE_PAD, VISION_END, VISION_START

URL_VARIABLE = "PPCR_TENSORRT_LLM_URL"
PACKAGE = "tensorrt_llm"
_TIMEOUT = 300
_EVENT, _LAST = b"data:", b"[DONE]"
_UNREADABLE = (OSError, HTTPException, ValueError, LookupError, TypeError)

Meanwhile = Callable[[], None] | None


@dataclass(frozen=True)
class Piece:
    """A piece of an answer.

    Attributes:
        text: what came since the piece before. reused: tokens of the prompt that were not computed again, as
            far as it is known by now.
    """

    text: str
    reused: int = 0


class Client(Protocol):
    """Something that completes a conversation about one image."""

    def stream(
        self, text: str, image: Image.Image, regex: str, max_tokens: int, meanwhile: Meanwhile
    ) -> Iterator[Piece]:
        """The answer to ``text`` (one image pad in it), held to ``regex``, as it comes."""
        ...


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

    def stream(
        self, text: str, image: Image.Image, regex: str, max_tokens: int, meanwhile: Meanwhile
    ) -> Iterator[Piece]:
        params = self._library.SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            guided_decoding=self._guide(regex=regex),
            add_special_tokens=False,
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
        )
        inputs = {"prompt": text, "multi_modal_data": {"image": [image]}}
        coming = self._llm.generate_async(inputs, sampling_params=params, streaming=True)
        if meanwhile is not None:
            meanwhile()
        # The one result, again and again: each step adds to its text.
        for result in coming:
            yield Piece(str(result.outputs[0].text_diff), int(result.cached_tokens))


class ServerClient:
    """An OpenAI-compatible server of TensorRT-LLM (``trtllm-serve``), over HTTP."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        with self._open("/v1/models", None) as response:
            try:
                self._model = str(json.load(response)["data"][0]["id"])
            except _UNREADABLE as error:
                raise self._no_answer("/v1/models", error) from None

    def stream(
        self, text: str, image: Image.Image, regex: str, max_tokens: int, meanwhile: Meanwhile
    ) -> Iterator[Piece]:
        path, body = "/v1/chat/completions", request(self._model, text, image, regex, max_tokens)
        # Asked from a thread of its own: the server may keep its head back until it has read the prompt.
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(self._open, path, body)
            if meanwhile is not None:
                meanwhile()
            with asked.result() as response:
                try:
                    yield from pieces(response)
                except _UNREADABLE as error:
                    raise self._no_answer(path, error) from None

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(self._url + path, data=data, headers=headers)
        try:
            return urllib.request.urlopen(asked, timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            said = " ".join(error.read(500).decode(errors="replace").split())
            raise EngineError(f"the server at {self._url} refused {path} ({error.code}): {said}") from None
        except _UNREADABLE as error:
            raise self._no_answer(path, error) from None

    def _no_answer(self, path: str, error: Exception) -> EngineError:
        told = f"the server at {self._url} does not answer {path} ({error!r})"
        return EngineError(f"{told}: start it as {PACKAGE}/README.md of the bundle says")


def pieces(lines: Any) -> Iterator[Piece]:
    """The pieces in a chat completion's server-sent events, the use of the cache with the last.

    Raises:
        ValueError, LookupError: an event is not a chunk of an answer, or the last one is missing.
    """
    for line in lines:
        if not line.startswith(_EVENT):
            continue  # the empty line between two events
        data = line.removeprefix(_EVENT).strip()
        if data == _LAST:
            return
        chunk = json.loads(data)
        if "choices" not in chunk:
            raise ValueError(str(chunk.get("message") or chunk)[:200])
        usage = chunk.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
        text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        yield Piece(text, int(details.get("cached_tokens") or 0))
    raise ValueError("the answer broke off")


def request(model: str, text: str, image: Image.Image, regex: str, max_tokens: int) -> dict[str, Any]:
    """The body of a streamed chat completion; only fields that the recorded request has."""
    return {
        "model": model,
        "messages": messages(text, image),
        "max_completion_tokens": max_tokens,
        "temperature": 0.0,
        "response_format": {"type": "regex", "regex": regex},
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": False},
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
