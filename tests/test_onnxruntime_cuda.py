"""The bound session of onnxruntime with the CPU in the GPU's place, against the CPU's own session."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ppcr.errors import BundleError, EngineError
from runtime import (
    engine_checks,
    onnxruntime_cuda_session,
    onnxruntime_library,
    onnxruntime_session,
    selection,
)
from runtime.bundle import Bundle
from runtime.cuda_driver import Gpu
from runtime.pipeline import Pipeline
from runtime.session import Prompts, Sessions

EXPRESSIONS = ("all red spheres behind the green cube", "the cube")
OURS = onnxruntime_cuda_session


@pytest.fixture(scope="module")
def bound(loaded: Bundle) -> Sessions:
    return OURS.load(loaded, threads=1, device="cpu")


@pytest.fixture(scope="module")
def plain(loaded: Bundle) -> Sessions:
    return onnxruntime_session.load(loaded, threads=1)


def test_bound_buffers_give_the_same_answers(
    loaded: Bundle, bound: Sessions, plain: Sessions, samples: Path
) -> None:
    image = np.asarray(Image.open(samples / "scene_0.png").convert("RGB"))
    same = replace(loaded, glossary=None)  # this session checks no drafts: costs could not be compared
    pipelines = [Pipeline(same, sessions, threads=1, engine=name) for name, sessions in pair(bound, plain)]
    scenes = [pipeline.open(image) for pipeline in pipelines]
    for expression in EXPRESSIONS:
        ours, theirs = (scene.segment(expression) for scene in scenes)
        assert ours.semantic == theirs.semantic
        np.testing.assert_array_equal(ours.spatial.locations, theirs.spatial.locations)
        np.testing.assert_array_equal(ours.instances, theirs.instances)
        np.testing.assert_array_equal(ours.scores, theirs.scores)
        assert ours.costs == theirs.costs
    assert len(theirs.scores) > 0
    assert bound.device == "cpu"


def pair(bound: Sessions, plain: Sessions) -> Iterator[tuple[str, Sessions]]:
    yield "onnxruntime-cuda", bound
    yield "onnxruntime", plain


def test_steps_and_blocks_share_a_cache_that_is_used_again(
    loaded: Bundle, bound: Sessions, plain: Sessions
) -> None:
    mllm: Any = bound.mllm
    prefix = loaded.tokenizer.before_image
    contexts = [sessions.mllm.open(prefix=prefix) for sessions in (bound, plain)]
    for ids in ([9, 4, 30], [7], [8], [5, 6], [11]):
        ours, theirs = (context.extend(ids).copy() for context in contexts)
        np.testing.assert_array_equal(ours, theirs)
        assert contexts[0].length == contexts[1].length
    first: Any = contexts[0]
    other = mllm.open(prefix=prefix)
    other.extend([40, 41])
    for context in contexts:
        context.truncate(len(prefix) + 3)
    np.testing.assert_array_equal(first.extend([7]), contexts[1].extend([7]))
    cache = first._cache
    contexts.clear()
    del first, context
    gc.collect()
    # From a used cache the conversation begins anew, with the prefix that another cache computed.
    again, fresh = mllm.open(prefix=prefix), plain.mllm.open(prefix=prefix)
    assert again._cache is cache and again.length == len(prefix)
    np.testing.assert_array_equal(again.extend([9, 4, 30]), fresh.extend([9, 4, 30]))
    with pytest.raises(ValueError, match="1 to"):
        mllm.open(again.capacity + 1)


def test_masks_in_parts_equal_masks_at_once(
    loaded: Bundle, bound: Sessions, plain: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, shapes, count = np.random.default_rng(3), loaded.manifest.shapes, 5
    pixels = rng.normal(size=(3, *shapes.image_size)).astype(np.float32)
    boxes = np.sort(rng.random((count, 2, 2), np.float32), 1).reshape(count, 4)
    text = rng.normal(size=(count, 4, shapes.hidden)).astype(np.float32)
    prompts = Prompts(
        boxes, boxes[:, :2].copy(), np.ones(count, np.float32), text, np.ones((count, 4), np.bool_)
    )
    segmenter: Any = bound.segmenter
    features = segmenter.encode(pixels)
    wanted = plain.segmenter.decode(plain.segmenter.encode(pixels), prompts)
    for most in (segmenter._most, 2):
        monkeypatch.setattr(segmenter, "_most", most)
        for one, other in zip(segmenter.decode(features, prompts), wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


def test_each_run_names_its_graph(bound: Sessions, loaded: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    context: Any = bound.mllm.open()
    cache = context._cache
    used: list[Any] = []

    class Recorder:
        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            used.append((binding is cache._single, options.get_run_config_entry("gpu_graph_id")))

    monkeypatch.setattr(cache, "_stepper", Recorder())
    monkeypatch.setattr(cache, "_decoder", Recorder())
    monkeypatch.setattr(cache, "_recorded", onnxruntime_library.graph_options(3))
    fed: dict[str, int] = {}

    class Binding:
        """As on a GPU: what is bound is copied then and there."""

        def bind_cpu_input(self, name: str, array: np.ndarray) -> None:
            fed[name] = int(array.flat[0]) if array.dtype == np.int64 else -1

    binding = Binding()
    for name in ("_block", "_few"):
        monkeypatch.setattr(cache, name, binding)
    context.extend([5, 6])
    context.extend([7])
    context.extend([8, 9, 10])
    assert used == [(False, "-1"), (True, "3"), (False, "-1")]
    assert (fed["write_indices"], fed["logits_index"]) == (3, 2)


def test_without_the_provider_one_line_says_what_to_install(
    loaded: Bundle, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match="has no CUDAExecutionProvider: install onnxruntime-gpu"):
        onnxruntime_library.require_provider("CUDAExecutionProvider")
    with pytest.raises(EngineError, match="onnxruntime-gpu in the place of onnxruntime$"):
        OURS.load(loaded, threads=1)
    monkeypatch.setattr(engine_checks, "first_gpu", lambda: Gpu("sm_90", 13000))
    monkeypatch.setattr(engine_checks, "_is_distributed", lambda package: package == "onnxruntime")
    with pytest.raises(
        EngineError, match="'onnxruntime-cuda' cannot be used here: this onnxruntime is the CPU"
    ):
        selection.choose(bundle, "onnxruntime-cuda")
    monkeypatch.setattr(engine_checks, "_is_distributed", lambda package: True)
    assert selection.choose(bundle, "onnxruntime-cuda").usable


def gpu_there(monkeypatch: pytest.MonkeyPatch, opened: Any) -> list[Any]:
    """A CUDA provider that ``opened`` answers for: (path, settings of the provider) -> a session."""
    asked: list[Any] = []

    def open_graph(path: Path, threads: int, providers: list[Any]) -> Any:
        asked.append(providers[0][1])
        return opened(path, providers[0][1])

    monkeypatch.setattr(OURS, "require_provider", lambda name: None)
    monkeypatch.setattr(OURS, "open_graph", open_graph)
    return asked


def test_a_provider_that_falls_back_to_the_cpu_is_an_error(
    loaded: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    fallen = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    gpu_there(monkeypatch, lambda path, settings: fallen)
    with pytest.raises(EngineError, match="CUDA provider does not start.*driver"):
        OURS.load(loaded, threads=1)


def test_a_step_that_cannot_be_recorded_runs_without_a_graph(
    loaded: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = SimpleNamespace(get_providers=lambda: [OURS.PROVIDER])

    def opened(path: Path, settings: dict[str, str]) -> Any:
        if "enable_cuda_graph" in settings:
            cause = RuntimeError("This session cannot use the graph capture feature as requested by the user")
            raise BundleError("onnxruntime cannot read it") from cause
        return session

    asked = gpu_there(monkeypatch, opened)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph"):
        assert OURS._open_decoder(loaded.graphs["decoder"], 1, "cuda") == (session, False)
    assert [set(settings) for settings in asked] == [{"device_id", "enable_cuda_graph"}, {"device_id"}]
    gpu_there(monkeypatch, lambda path, settings: session)
    assert OURS._open_decoder(loaded.graphs["decoder"], 1, "cuda") == (session, True)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bfc_arena.cc:376 Failed to allocate memory for "
            "requested buffer of size 117440512",
            r"out of memory \(117\.4 MB more were asked for\): close other programs, or .*--precision int8",
        ),
        ("CUDA failure 2: out of memory ; GPU=0", "out of memory: close other programs"),
    ],
)
def test_a_full_gpu_is_one_line(
    bound: Sessions, said: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError(said)

    context: Any = bound.mllm.open()
    monkeypatch.setattr(context._cache, "_launch_step", full)
    with pytest.raises(EngineError, match=told) as caught:
        context.extend([5])
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(context._cache, "_launch_step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        context.extend([5])
