"""The segmenter's graphs against torch, at counts and lengths other than those they were traced with."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from export.attention_function import DOMAIN, attention_nodes, inlined
from export.precision import quantise, quantise_products
from export.segmenter_graph import FEATURES, OUTPUTS, PROMPTS, write_image_encoder, write_mask_decoder
from ppcr.model.mask_decoder import CellFeatures
from ppcr.model.segmenter import Segmenter, SegmenterConfig

SIDE, TEXT, MOST = 64, 32, 24


@pytest.fixture(scope="module")
def segmenter() -> Segmenter:
    torch.manual_seed(5)
    config = SegmenterConfig(
        image_size=SIDE, dim=32, high_res=(16, 8), encoder_blocks=1, context_dim=32, context_blocks=1,
        text_dim=TEXT, text_layers=1, text_tokens=4, max_text=MOST, heads=2, mlp=32,
    )  # fmt: skip
    model = Segmenter(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # untouched statistics would hide a folding mistake
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


@pytest.fixture(scope="module")
def graphs(segmenter: Segmenter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("segmenter")
    write_image_encoder(segmenter, folder / "image_encoder.onnx")
    write_mask_decoder(segmenter, folder / "mask_decoder.onnx")
    return folder


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)


def pixels() -> torch.Tensor:
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def features(segmenter: Segmenter) -> CellFeatures:
    with torch.no_grad():
        return segmenter.encode(pixels())


def prompts(count: int, length: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(count * 100 + length)
    corners = torch.rand(count, 2, 2, generator=g).sort(dim=1).values.flatten(1)
    valid = (torch.arange(count) % 3 != 1).float()  # some by text alone
    mask = torch.arange(length) < torch.randint(0, length + 1, (count, 1), generator=g)
    mask[0] = False  # no text at all
    text = torch.randn(count, length, TEXT, generator=g)
    return corners, torch.rand(count, 2, generator=g), valid, text, mask


def test_image_encoder_equals_torch(segmenter: Segmenter, graphs: Path) -> None:
    outputs = run(graphs / "image_encoder.onnx", {"pixels": pixels().numpy()})
    for got, wanted in zip(outputs, features(segmenter), strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("count", "length"), [(1, 1), (1, 9), (2, 11), (7, MOST), (13, 5)])
def test_mask_decoder_equals_torch(segmenter: Segmenter, graphs: Path, count: int, length: int) -> None:
    given, image = prompts(count, length), features(segmenter)
    feeds = {name: value.numpy() for name, value in zip((*FEATURES, *PROMPTS), (*image, *given), strict=True)}
    logits, scores = run(graphs / "mask_decoder.onnx", feeds)
    with torch.no_grad():
        wanted_logits, wanted_scores = segmenter.decode(image, *given)
    assert logits.shape == (count, SIDE // 2, SIDE // 2)
    np.testing.assert_allclose(logits, wanted_logits.numpy(), atol=2e-4, rtol=1e-4)
    np.testing.assert_allclose(scores, wanted_scores.numpy(), atol=1e-5)


def test_graphs_tell_nothing_of_where_they_were_made(graphs: Path) -> None:
    for name in ("image_encoder", "mask_decoder"):
        model = onnx.load(graphs / f"{name}.onnx")
        text = (graphs / f"{name}.onnx").read_bytes()
        own = {DOMAIN} if name == "mask_decoder" else set()
        assert {opset.domain for opset in model.opset_import} == {""} | own
        assert {function.domain for function in model.functions} == own
        assert b"segmenter_graph" not in text and b"site-packages" not in text
    assert [value.name for value in onnx.load(graphs / "mask_decoder.onnx").graph.output] == list(OUTPUTS)


def test_function_leaves_nothing_for_the_engine_to_call(
    segmenter: Segmenter, graphs: Path, tmp_path: Path
) -> None:
    """onnxruntime puts the body in the node's place first: no more runs than without functions."""
    model = onnx.load(graphs / "mask_decoder.onnx")
    names = [node.name for node in attention_nodes(model)]
    layers = [
        f"mask_decoder.layers.{i}.{way}" for i in range(2) for way in ("prompt_to_image", "image_to_prompt")
    ]
    assert names == [*layers, "mask_decoder.last_prompt_to_image"]
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(graphs / "mask_decoder.onnx", options, providers=["CPUExecutionProvider"])
    run_nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    plain = tmp_path / "plain.onnx"
    onnx.save(inlined(model), plain)
    options.optimized_model_filepath = str(tmp_path / "plain_optimised.onnx")
    ort.InferenceSession(plain, options, providers=["CPUExecutionProvider"])
    written_out = onnx.load(tmp_path / "plain_optimised.onnx").graph.node
    run, written = (Counter(n.op_type for n in nodes) for nodes in (run_nodes, written_out))
    assert run.total() <= written.total()
    # Written out for the quantiser as well: no cast of a scale, which would keep it from being fused.
    assert written["Cast"] == run["Cast"] and written["FusedMatMul"] == run["FusedMatMul"]
    assert not any(node.domain == DOMAIN or node.op_type == "CastLike" for node in run_nodes)
    assert sum(node.op_type in ("LayerNormalization", "SkipLayerNormalization") for node in run_nodes) >= 5


def test_int8_decoder_stays_close(segmenter: Segmenter, graphs: Path, tmp_path: Path) -> None:
    quantise("mask_decoder", graphs / "mask_decoder.onnx", tmp_path / "int8.onnx")
    image, given = features(segmenter), prompts(5, 9)
    feeds = {name: value.numpy() for name, value in zip((*FEATURES, *PROMPTS), (*image, *given), strict=True)}
    logits, _ = run(tmp_path / "int8.onnx", feeds)
    wanted, _ = run(graphs / "mask_decoder.onnx", feeds)
    assert np.abs(logits - wanted).mean() < 0.1 * np.abs(wanted).mean()
    used = {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert "MatMulInteger" in used


def test_products_of_tokens_keep_full_precision(graphs: Path, tmp_path: Path) -> None:
    """Products over all cells of the image run in int8, those of a prompt's tokens do not."""
    quantise("mask_decoder", graphs / "mask_decoder.onnx", tmp_path / "int8.onnx")
    changed = _changed(graphs / "mask_decoder.onnx", tmp_path / "int8.onnx")
    layers = [f"layers.{i}" for i in range(2)]
    cells = {f"{layer}.prompt_to_image.{name}.weight" for layer in layers for name in "kv"}
    cells |= {f"{layer}.image_to_prompt.{name}.weight" for layer in layers for name in ("q", "out")}
    cells |= {f"last_prompt_to_image.{name}.weight" for name in "kv"} | {"up_0.weight", "up_1.weight"}
    assert changed == {f"mask_decoder.{name}" for name in cells}


def test_products_may_be_chosen(graphs: Path, tmp_path: Path) -> None:
    quantise_products(graphs / "mask_decoder.onnx", tmp_path / "some.onnx", chosen=r"^prompt_encoder\.")
    changed = _changed(graphs / "mask_decoder.onnx", tmp_path / "some.onnx")
    assert changed and all(weight.startswith("prompt_encoder.") for weight in changed)


def _changed(source: Path, target: Path) -> set[str]:
    """The weights whose products run in int8 in ``target``."""
    plain = inlined(onnx.load(source))
    before = {node.name: node.input[1] for node in plain.graph.node if node.op_type == "MatMul"}
    after = {node.name for node in onnx.load(target).graph.node if node.op_type == "MatMul"}
    assert set(before) > after
    return {before[name] for name in set(before) - after}
