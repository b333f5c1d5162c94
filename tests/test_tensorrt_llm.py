"""The TensorRT-LLM adapter and package: recorded signatures only, and the pipeline's own answers.

What answers here is onnxruntime behind the adapter's interface; TensorRT-LLM itself is not executed.
"""

from __future__ import annotations

import json
import sys
import threading
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.tensorrt_llm_package import with_template
from ppcr import images, masks
from ppcr.constraint import Constraint
from ppcr.errors import BundleError, EngineError
from ppcr.prompts import IM_END
from runtime import onnxruntime_session, tensorrt_llm_session
from runtime.bundle import Bundle
from runtime.generation import generate
from runtime.pipeline import Pipeline
from runtime.session import Sessions
from runtime.tensorrt_llm_clients import (
    URL_VARIABLE,
    LibraryClient,
    Piece,
    ServerClient,
    messages,
    pieces,
    request,
)
from runtime.tensorrt_llm_session import TurnMLLM, fit
from tests.recorded import table

TABLE = table("tensorrt_llm")
EXPRESSION = "all red spheres behind the green cube"


class Oracle:
    """A client that answers as onnxruntime does, given only what a client is given: text, image and regex."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._mllm = bundle, onnxruntime_session.load(bundle, threads=1).mllm
        self.asked: list[str] = []

    def stream(
        self, text: str, image: Image.Image, regex: str, max_tokens: int, meanwhile: Any
    ) -> Iterator[Piece]:
        self.asked.append(text)
        tokenizer, config = self._bundle.tokenizer, self._bundle.config.mllm
        (constraint,) = [c for c in self._constraints() if c.regex(tokenizer.decode) == regex]
        pixels = images.normalise(np.asarray(image), config.mean, config.std)
        features = self._mllm.encode_image(
            images.patchify(pixels, config.patch, config.merge, config.temporal)
        )
        pad, count = tokenizer.image_token, self._bundle.manifest.shapes.image_tokens
        ids = [i for token in tokenizer.encode(text) for i in ([pad] * count if token == pad else [token])]
        turn = generate(self._mllm.open(), ids, constraint, features=features, meanwhile=meanwhile)
        assert len(turn.tokens) < max_tokens
        answer = tokenizer.decode(turn.tokens) + IM_END
        yield from (Piece(answer[i : i + 3], 7 if i else 0) for i in range(0, len(answer), 3))

    def _constraints(self) -> list[Constraint]:
        tokenizer = self._bundle.tokenizer
        return [tokenizer.semantic_constraint, *(tokenizer.spatial_constraint(n) for n in range(1, 7))]


@pytest.fixture(scope="module")
def oracle(loaded: Bundle) -> Oracle:
    return Oracle(loaded)


def test_turns_give_the_answers_of_the_session_level(loaded: Bundle, oracle: Oracle, samples: Path) -> None:
    segmenter = onnxruntime_session.load_segmenter(loaded, threads=1)
    ours = Pipeline(loaded, Sessions(TurnMLLM(oracle, loaded), segmenter), threads=1, engine="tensorrt_llm")
    theirs = Pipeline.load(loaded.folder, precision="fp32", threads=1, engine="onnxruntime")
    scenes = [pipeline.open(samples / "scene_0.png") for pipeline in (ours, theirs)]
    for expression in (EXPRESSION, "the small cube"):  # the second goes back to the end of the image
        one, other = (scene.segment(expression) for scene in scenes)
        assert one.semantic == other.semantic
        np.testing.assert_array_equal(one.spatial.locations, other.spatial.locations)
        assert masks.iou(one.mask, other.mask) == 1.0
        assert one.costs.tokens == other.costs.tokens
        assert one.costs.reused_tokens > 0
    assert all(text.count("<|image_pad|>") == 1 for text in oracle.asked)


def test_image_is_the_one_that_was_cut(loaded: Bundle) -> None:
    config = loaded.config.mllm
    image = np.random.default_rng(0).integers(0, 256, (*config.image_size, 3), dtype=np.uint8)
    pixels = images.normalise(image, config.mean, config.std)
    patches = images.patchify(pixels, config.patch, config.merge, config.temporal)
    back = TurnMLLM(None, loaded).encode_image(patches)  # type: ignore[arg-type]
    np.testing.assert_array_equal(np.asarray(back), image)


def checked(name: str, calls: list[str]) -> Callable[..., Any]:
    """A class or function of TensorRT-LLM that takes the recorded keywords only."""

    def called(*arguments: Any, **keywords: Any) -> Any:
        assert set(keywords) <= set(TABLE["keywords"][name]), f"{name} has no {keywords}"
        calls.append(name)
        return types.SimpleNamespace(**keywords)

    return called


class Streamed:
    """The result of a streamed request: one object that each step brings on by a letter.

    Only attributes that the recorded classes have can be read, of it and of its output.
    """

    def __init__(self, text: str) -> None:
        self._text, self._count = text, 0

    def __iter__(self) -> Streamed:
        return self

    def __next__(self) -> Streamed:
        if self._count == len(self._text):
            raise StopIteration
        self._count += 1
        return self

    def __getattr__(self, name: str) -> Any:
        assert name in TABLE["attributes"]["GenerationResult"], name
        assert {"text", "text_diff"} <= set(TABLE["attributes"]["CompletionOutput"])
        text = self._text[: self._count]
        output = types.SimpleNamespace(text=text, text_diff=text[-1:])
        return {"outputs": [output], "cached_tokens": 3, "finished": self._count == len(self._text)}[name]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`tensorrt_llm` as far as the adapter knows it; its answer is the regex that it was asked with."""
    calls: list[str] = []
    module, llmapi = types.ModuleType("tensorrt_llm"), types.ModuleType("tensorrt_llm.llmapi")

    def llm(**keywords: Any) -> Any:
        checked("LLM", calls)(**keywords)
        assert keywords["guided_decoding_backend"] in TABLE["guided_decoding_backends"]

        def generate_async(inputs: Any, **options: Any) -> Any:
            checked("LLM.generate_async", calls)(**options)
            assert set(inputs) == {"prompt", "multi_modal_data"}
            assert options["streaming"] is True
            return Streamed(options["sampling_params"].guided_decoding.regex)

        return types.SimpleNamespace(generate_async=generate_async)

    module.LLM, module.SamplingParams = llm, checked("SamplingParams", calls)  # type: ignore[attr-defined]
    module.llmapi = llmapi  # type: ignore[attr-defined]
    for name in ("GuidedDecodingParams", "KvCacheConfig", "CudaGraphConfig"):
        setattr(llmapi, name, checked(name, calls))
    monkeypatch.setitem(sys.modules, "tensorrt_llm", module)
    monkeypatch.setitem(sys.modules, "tensorrt_llm.llmapi", llmapi)
    return calls


def test_library_is_called_with_recorded_keywords_only(library: list[str]) -> None:
    client, begun = LibraryClient("model", 384), list[str]()
    coming = client.stream("x", Image.new("RGB", (8, 8)), "a+", 5, lambda: begun.append("encoder"))
    assert list(coming) == [Piece("a", 3), Piece("+", 3)]
    assert begun == ["encoder"]
    assert set(library) == set(TABLE["keywords"])


def test_request_has_recorded_fields_only() -> None:
    body = request("m", "<|im_start|>user\nx<|im_end|>\n", Image.new("RGB", (8, 8)), "a+", 5)
    assert set(body) <= set(TABLE["fields"]["ChatCompletionRequest"])
    assert set(body["response_format"]) <= set(TABLE["fields"]["ResponseFormat"])
    assert body["response_format"]["type"] in TABLE["response_format_types"]
    assert body["stream"] is True
    assert set(body["stream_options"]) <= set(TABLE["fields"]["StreamOptions"])
    assert json.loads(json.dumps(body)) == body


def test_messages_render_to_the_conversation_they_came_from(loaded: Bundle, checkpoint: Path) -> None:
    jinja2 = pytest.importorskip("jinja2", reason="jinja2 is not installed: it comes with torch")
    tokenizer = loaded.tokenizer
    ids = [
        *tokenizer.prefix(1), *tokenizer.expression(EXPRESSION, max_tokens=60),
        *tokenizer.encode("sphere; red; ; two"), *tokenizer.between_stages,
    ]  # fmt: skip
    text = tokenizer.decode(ids)
    config = json.loads((checkpoint / "mllm" / "tokenizer_config.json").read_text())
    template = jinja2.Template(with_template(config)["chat_template"])
    flat = []
    for message in messages(text, Image.new("RGB", (8, 8))):
        content = message["content"]
        if not isinstance(content, str):  # as the server flattens it
            said = [part["text"] for part in content if part["type"] == "text"]
            content = "\n".join(["<|vision_start|><|image_pad|><|vision_end|>", *said])
        flat.append({"role": message["role"], "content": content})
    assert template.render(messages=flat, add_generation_prompt=True) == text


def test_answers_are_held_to_the_constraint(loaded: Bundle) -> None:
    tokenizer = loaded.tokenizer
    constraint = tokenizer.spatial_constraint(1)
    right = constraint.start().allowed()[1:7].tolist()
    assert fit([*right, tokenizer.encode(IM_END)[0]], constraint, "") == tuple(right)
    assert fit(right, constraint, "") == tuple(right)
    between = right[5] + 1  # a location that is no step of the answer's
    for wrong in (right[:5], [*right[:5], tokenizer.separator], [*right[:5], between], []):
        with pytest.raises(EngineError, match="does not fit the constraint"):
            fit(wrong, constraint, "text")


def chunks(answer: str, model: str) -> list[dict[str, Any]]:
    """What a server streams: the role, a letter at a time, and the use of the cache at the end."""
    deltas = [{"role": "assistant", "content": ""}, *({"content": letter} for letter in answer)]
    found: list[dict[str, Any]] = [
        {"model": model, "choices": [{"index": 0, "delta": delta}]} for delta in deltas
    ]
    usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
    found.append({"model": model, "choices": [], "usage": usage})
    for chunk in found:
        assert set(chunk) <= set(TABLE["fields"]["ChatCompletionStreamResponse"])
    assert set(usage) <= set(TABLE["fields"]["UsageInfo"])
    assert {key for delta in deltas for key in delta} <= set(TABLE["fields"]["DeltaMessage"])
    return found


@pytest.fixture
def server() -> Iterator[str]:
    """An HTTP server that takes what ``trtllm-serve`` takes, and refuses unknown fields as it does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, {"object": "list", "data": [{"id": "tiny"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            regex = body["response_format"]["regex"]
            told: list[Any] = []
            if set(body) - set(TABLE["fields"]["ChatCompletionRequest"]) or regex == "refuse":
                return self._answer(400, {"object": "error", "message": "Extra inputs are not permitted"})
            for chunk in chunks(regex, body["model"]):
                told.append(chunk)
            self.send_response(200)
            self.end_headers()
            broken = regex == "break off"
            for chunk in told[:1] if broken else [*told, "[DONE]"]:
                data = chunk if isinstance(chunk, str) else json.dumps(chunk)
                self.wfile.write(f"data: {data}\n\n".encode())
            return None

        def _answer(self, code: int, value: dict[str, Any]) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *words: Any) -> None:
            pass

    made = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()


def test_server_is_asked_and_its_refusals_told(server: str) -> None:
    image, begun = Image.new("RGB", (8, 8)), list[str]()
    client = ServerClient(server + "/v1/")
    text = "<|im_start|>user\nx<|im_end|>\n"
    found = list(client.stream(text, image, "a+", 5, lambda: begun.append("encoder")))
    assert found == [Piece(""), Piece("a"), Piece("+"), Piece("", 4)]
    assert begun == ["encoder"]
    with pytest.raises(EngineError, match=r"refused /v1/chat/completions \(400\): .*not permitted"):
        list(client.stream("", image, "refuse", 5, None))
    with pytest.raises(EngineError, match=r"does not answer .*the answer broke off.*start it as"):
        list(client.stream("", image, "break off", 5, None))


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([b'data: {"object": "error", "message": "out of memory"}\n'], "out of memory"),
        ([b"data: nonsense\n"], "Expecting value"),
        ([b'data: {"choices": []}\n'], "broke off"),
    ],
)
def test_events_that_are_no_answer(lines: list[bytes], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        list(pieces(lines))


def test_answer_is_heard_as_it_comes(loaded: Bundle, oracle: Oracle, samples: Path) -> None:
    tokenizer, config = loaded.tokenizer, loaded.config.mllm
    with Image.open(samples / "scene_0.png") as opened:
        image = opened.convert("RGB").resize(config.image_size[::-1])
    context, heard = TurnMLLM(oracle, loaded).open(), list[str]()
    prompt = [
        *tokenizer.prefix(loaded.manifest.shapes.image_tokens),
        *tokenizer.expression(EXPRESSION, max_tokens=60),
    ]
    turn = context.answer(prompt, tokenizer.semantic_constraint, features=image, heard=heard.append)
    assert len(heard) > 1
    assert "".join(heard).removesuffix(IM_END) == tokenizer.decode(turn.tokens)
    assert turn.reused_tokens == 7


def test_what_is_missing_is_one_line(
    loaded: Bundle, monkeypatch: pytest.MonkeyPatch, server: str, tmp_path: Path
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    with pytest.raises(BundleError, match="write it with: python export/tensorrt_llm_package.py"):
        tensorrt_llm_session.load(loaded, threads=1)
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(EngineError, match="install it from NVIDIA, or name a server"):
        LibraryClient(str(tmp_path), 384)
    monkeypatch.setenv(URL_VARIABLE, "http://127.0.0.1:9")
    with pytest.raises(EngineError, match="does not answer /v1/models"):
        tensorrt_llm_session.load(loaded, threads=1)
