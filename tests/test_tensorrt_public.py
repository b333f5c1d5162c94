"""The TensorRT session with public models, on a GPU that is not there: image sizes, DeepStack, SAM."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ppcr.manifest import EngineEntry, FileEntry, Manifest, vision_role
from runtime import device, onnxruntime_session, tensorrt_library, tensorrt_session
from runtime.bundle import Bundle
from runtime.engine_checks import Asked, _tensorrt
from runtime.session import Prompts
from runtime.tensorrt_engine import Engine
from runtime.tensorrt_library import TensorRT
from runtime.tensorrt_segmenter import TensorRTSegmenter
from tests.fake_cuda import FakeCuda
from tests.fake_tensorrt import FakeTensorRT, engine_file
from tests.families import worst
from tests.public_bundle import make_public, typed


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    cuda = FakeCuda()
    monkeypatch.setattr(device, "bindings", lambda: cuda)
    fake = FakeTensorRT(cuda)
    monkeypatch.setattr(tensorrt_library, "find", lambda: TensorRT(fake, "tensorrt_rtx", fake.__version__))
    return fake


def compiled(bundle: Path, work: Path) -> None:
    """Give ``bundle`` engines for sm_89 that only `FakeTensorRT` can load."""
    manifest, entries = Manifest.load(bundle), []
    for role in manifest.engine_roles:
        place = work / role
        place.mkdir(parents=True)
        job, model = typed(bundle, role, "fp16", place)
        name = f"engines/sm_89/{role}.fp16.engine"
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(engine_file(model.SerializeToString(), job.profiles))
        graph = Path(job.source).relative_to(bundle).as_posix()
        made = FakeTensorRT.__version__
        digest = manifest.files[graph].sha256
        entries.append(EngineEntry(role, "sm_89", "fp16", name, graph, digest, "tensorrt_rtx", made))
    files = {**manifest.files, **{e.file: FileEntry.of(bundle / e.file) for e in entries}}
    dataclasses.replace(manifest, files=files, engines=tuple(entries)).save(bundle)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_every_image_size_answers_as_onnxruntime_does(
    family: str, trt: FakeTensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_public(family, tmp_path, ("fp32", "fp16"))
    compiled(folder, tmp_path / "work")
    bundle = Bundle.load(folder, precision="fp32")
    config, shapes = bundle.config.mllm, bundle.manifest.shapes
    reference, ours = (
        onnxruntime_session.load(bundle, threads=1).mllm, tensorrt_session.load(bundle, threads=1).mllm
    )  # fmt: skip
    rng = np.random.default_rng(len(family))
    before = list(bundle.tokenizer.before_image)
    question = list(bundle.tokenizer.expression("the red cube", max_tokens=40))
    for size in config.sizes:
        rows, columns = config.grid_of(size)
        patches = rng.normal(size=(rows * columns * config.merge**2, shapes.patch_dim)).astype(np.float32)
        prefix = list(bundle.tokenizer.prefix(rows * columns))
        found = []
        for mllm in (reference, ours):
            features = mllm.encode_image(patches, size=size)
            context = mllm.open(prefix=before, size=size)
            found.append([
                context.extend([*prefix[len(before) :], *question], features).copy(),
                context.extend([7]).copy(),
                context.extend([8, 9]).copy(),
            ])  # fmt: skip
        for one, other in zip(*found, strict=True):
            assert worst(other, one) < 0.02
    assert {entry.role for entry in bundle.manifest.engines} >= {
        vision_role(size) for size in config.sizes[1:]
    }


def test_public_models_are_not_passed_over(trt: FakeTensorRT, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime import engine_checks
    from runtime.cuda_driver import Gpu

    class Held:
        def engine_set(self, target: str) -> None:
            assert target == "sm_89"

    monkeypatch.setattr(engine_checks, "first_gpu", lambda: Gpu("sm_89", 13000))
    monkeypatch.setattr(engine_checks, "_require_installed", lambda *names: None)
    _tensorrt(Asked(Held()))  # type: ignore[arg-type]


def graph(nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any]) -> bytes:
    """A serialised model; shapes by name, text_mask is boolean."""
    kinds = {"text_mask": TensorProto.BOOL}
    values = [
        [
            helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), shape)
            for n, shape in part.items()
        ]
        for part in (inputs, outputs)
    ]
    made = helper.make_graph(nodes, "g", *values)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def test_a_segmenter_without_finer_features(trt: FakeTensorRT, tmp_path: Path) -> None:
    # As SAM and MobileSAM: one kind of features. Masks are sums of boxes times the image.
    encoder = graph(
        [
            helper.make_node(
                "AveragePool", ["pixels"], ["image_features"], kernel_shape=[2, 2], strides=[2, 2]
            )
        ],
        {"pixels": [1, 3, 8, 8]},
        {"image_features": [1, 3, 4, 4]},
    )
    one = helper.make_tensor("one", TensorProto.INT64, [1], [1])
    cells = helper.make_tensor("cells", TensorProto.INT64, [3], [-1, 1, 1])
    decoder = graph(
        [
            helper.make_node("Constant", [], ["last"], value=one),
            helper.make_node("Constant", [], ["column"], value=cells),
            helper.make_node("ReduceSum", ["image_features", "last"], ["flat"], keepdims=0),
            helper.make_node("ReduceSum", ["boxes", "last"], ["sizes"], keepdims=0),
            helper.make_node("Reshape", ["sizes", "column"], ["factors"]),
            helper.make_node("Mul", ["flat", "factors"], ["mask_logits"]),
            helper.make_node("ReduceSum", ["points", "last"], ["summed"], keepdims=0),
            # Every prompt is read, so that none is an input without a use.
            helper.make_node("ReduceMean", ["text_embeddings"], ["text"], keepdims=0),
            helper.make_node("Cast", ["text_mask"], ["shown"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["shown"], ["seen"], keepdims=0),
            helper.make_node("Mul", ["text", "seen"], ["weight"]),
            helper.make_node("Mul", ["summed", "spatial_valid"], ["valid"]),
            helper.make_node("Mul", ["valid", "weight"], ["scores"]),
        ],
        {
            "image_features": [1, 3, 4, 4], "boxes": ["N", 4], "points": ["N", 2], "spatial_valid": ["N"],
            "text_embeddings": ["N", "T", 2], "text_mask": ["N", "T"],
        },
        {"mask_logits": ["N", 4, 4], "scores": ["N"]},
    )  # fmt: skip
    paths = {"encoder": (encoder, ()), "decoder": (decoder, ({"N": (1, 2, 4), "T": (1, 2, 3)},))}
    library = TensorRT(trt, "tensorrt_rtx", trt.__version__)
    opened = []
    for name, (model, profiles) in paths.items():
        path = tmp_path / f"{name}.engine"
        path.write_bytes(engine_file(model, profiles))
        opened.append(Engine(library, library.create_runtime(), path, "rebuild"))
    segmenter = TensorRTSegmenter(*opened)
    pixels = np.random.default_rng(1).random((3, 8, 8), np.float32)
    boxes = np.random.default_rng(2).random((5, 4), np.float32)
    prompts = Prompts(
        boxes, boxes[:, :2].copy(), np.ones(5, np.float32), np.ones((5, 2, 2), np.float32),
        np.ones((5, 2), np.bool_),
    )  # fmt: skip
    features = segmenter.encode(pixels)
    assert set(features.memory) == {"image_features"}
    logits, scores = segmenter.decode(features, prompts)
    pooled = pixels.reshape(3, 4, 2, 4, 2).mean((2, 4)).sum(0)
    np.testing.assert_allclose(logits, boxes.sum(1)[:, None, None] * pooled, rtol=1e-5)
    np.testing.assert_allclose(scores, boxes[:, :2].sum(1), rtol=1e-5)
