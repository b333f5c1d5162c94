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

from export.tensorrt_llm_package import image_processor, llm_arguments, with_template, write_package, yaml
from ppcr import images, masks
from ppcr.checkpoint import Checkpoint
from ppcr.constraint import Constraint
from ppcr.errors import BundleError, CheckpointError, EngineError
from ppcr.prompts import IM_END
from runtime import onnxruntime_session, tensorrt_llm_session
from runtime.bundle import Bundle
from runtime.generation import generate
from runtime.pipeline import Pipeline
from runtime.session import Sessions
from runtime.tensorrt_llm_session import LibraryClient, ServerClient, TurnMLLM, fit, messages, request
from tests.fake_gpu import table

TABLE = table("tensorrt_llm")
EXPRESSION = "all red spheres behind the green cube"


class Oracle:
    """A client that answers as onnxruntime does, given only what a client is given: text, image and regex."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._mllm = bundle, onnxruntime_session.load(bundle, threads=1).mllm
        self.asked: list[str] = []

    def complete(
        self, text: str, image: Image.Image, regex: str, max_tokens: int, meanwhile: Any
    ) -> tuple[str, int]:
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
        return tokenizer.decode(turn.tokens) + IM_END, 7

    def _constraints(self) -> list[Constraint]:
        tokenizer = self._bundle.tokenizer
        return [tokenizer.semantic_constraint, *(tokenizer.spatial_constraint(n) for n in range(1, 7))]


@pytest.fixture(scope="module")
def loaded(bundle: Path) -> Bundle:
    return Bundle.load(bundle, precision="fp32")


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
            text = options["sampling_params"].guided_decoding.regex
            output = types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text)])
            return types.SimpleNamespace(result=lambda: output)

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
    text, reused = client.complete("x", Image.new("RGB", (8, 8)), "a+", 5, lambda: begun.append("encoder"))
    assert (text, reused, begun) == ("a+", 0, ["encoder"])
    assert set(library) == set(TABLE["keywords"])


def test_request_has_recorded_fields_only() -> None:
    body = request("m", "<|im_start|>user\nx<|im_end|>\n", Image.new("RGB", (8, 8)), "a+", 5)
    assert set(body) <= set(TABLE["fields"]["ChatCompletionRequest"])
    assert set(body["response_format"]) <= set(TABLE["fields"]["ResponseFormat"])
    assert body["response_format"]["type"] in TABLE["response_format_types"]
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
    right = [tokenizer.first_location + n for n in (1, 2, 3, 4, 5, 6)]
    assert fit([*right, tokenizer.encode(IM_END)[0]], constraint, "") == tuple(right)
    assert fit(right, constraint, "") == tuple(right)
    for wrong in (right[:5], [*right[:5], tokenizer.separator], []):
        with pytest.raises(EngineError, match="does not fit the constraint"):
            fit(wrong, constraint, "text")


@pytest.fixture
def server() -> Iterator[str]:
    """An HTTP server that takes what ``trtllm-serve`` takes, and refuses unknown fields as it does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, {"object": "list", "data": [{"id": "tiny"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            regex = body["response_format"]["regex"]
            if set(body) - set(TABLE["fields"]["ChatCompletionRequest"]) or regex == "refuse":
                return self._answer(400, {"object": "error", "message": "Extra inputs are not permitted"})
            usage = {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
            choices = [{"index": 0, "message": {"role": "assistant", "content": regex}}]
            return self._answer(200, {"model": body["model"], "choices": choices, "usage": usage})

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
    image = Image.new("RGB", (8, 8))
    client = ServerClient(server + "/v1/")
    assert client.complete("<|im_start|>user\nx<|im_end|>\n", image, "a+", 5, None) == ("a+", 4)
    with pytest.raises(EngineError, match=r"refused /v1/chat/completions \(400\): .*not permitted"):
        client.complete("", image, "refuse", 5, None)


def test_what_is_missing_is_one_line(
    loaded: Bundle, monkeypatch: pytest.MonkeyPatch, server: str, tmp_path: Path
) -> None:
    monkeypatch.delenv(tensorrt_llm_session.URL_VARIABLE, raising=False)
    with pytest.raises(BundleError, match="write it with: python export/tensorrt_llm_package.py"):
        tensorrt_llm_session.load(loaded, threads=1)
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(EngineError, match="install it from NVIDIA, or name a server"):
        LibraryClient(str(tmp_path), 384)
    monkeypatch.setenv(tensorrt_llm_session.URL_VARIABLE, "http://127.0.0.1:9")
    with pytest.raises(EngineError, match="does not answer /v1/models"):
        tensorrt_llm_session.load(loaded, threads=1)


def test_package_holds_a_whole_model(checkpoint: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    write_package(opened, tmp_path / "tensorrt_llm")
    model = tmp_path / "tensorrt_llm" / "model"
    for path in opened.mllm.iterdir():
        copy = model / path.name
        assert copy.read_bytes() == path.read_bytes() or path.name == "tokenizer_config.json"
    arguments = llm_arguments(opened.config.mllm)
    assert set(arguments) <= set(TABLE["keywords"]["LLM"])
    assert set(arguments["kv_cache_config"]) <= set(TABLE["keywords"]["KvCacheConfig"])
    assert set(arguments["cuda_graph_config"]) <= set(TABLE["keywords"]["CudaGraphConfig"])
    assert "trtllm-serve model" in (tmp_path / "tensorrt_llm" / "README.md").read_text()
    read = pytest.importorskip("yaml").safe_load((tmp_path / "tensorrt_llm" / "llm_args.yaml").read_text())
    assert read == arguments == pytest.importorskip("yaml").safe_load(yaml(arguments))
    sizes = json.loads((model / "preprocessor_config.json").read_text())
    assert sizes == image_processor(opened.config.mllm)
    height, width = opened.config.mllm.image_size
    assert sizes["min_pixels"] == sizes["max_pixels"] == height * width


def test_foreign_template_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no chat template of this project"):
        with_template({"chat_template": "{{ messages }}"})
