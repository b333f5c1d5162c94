"""The benchmark that builds engines of public models: drawn weights, its rows, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks import engines as bench
from benchmarks import results
from benchmarks.drawn import DrawnTensors
from benchmarks.engines import DecoderGraph, Wanted, line, measure, parser, plan
from export.engine_layers import Built, Kernel
from ppcr.errors import EngineError, UsageError
from ppcr.manifest import Shapes
from runtime.tensorrt_library import TensorRT
from tests.families import Small

# A width of heads that engines have an attention for.
SMALL = Small("qwen2_5_vl", hidden=256, heads=4, kv_heads=2, head_dim=64, layers=2)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small decoder in the place of the published ones."""
    monkeypatch.setattr(bench, "published_config", lambda name, layers=None: SMALL.config().to_dict())


def test_drawn_weights_have_the_shapes_asked_for_and_stay_the_same() -> None:
    one, other = DrawnTensors(), DrawnTensors()
    for tensors in (one, other):
        tensors.require("a.weight", (300, 70))
        tensors.require("b.weight", (40, 70))
        tensors.require("a.norm.weight", (70,))
    matrix = one.matrix("a.weight", "b.weight")
    assert matrix.shape == (340, 70)
    columns = matrix.columns(10, 25)
    assert columns.shape == (340, 15) and columns.dtype == np.float32
    np.testing.assert_array_equal(columns, other.matrix("a.weight", "b.weight").columns(10, 25))
    assert abs(columns.std() - 0.02) < 0.002
    assert not np.array_equal(columns[:40], columns[300:]), "two matrices are one"
    assert abs(one["a.norm.weight"].mean() - 1) < 0.02
    held = {name: name in one for name in ("k_proj.bias", "o_proj.bias", "o_proj.weight")}
    assert held == {"k_proj.bias": True, "o_proj.bias": False, "o_proj.weight": True}


def test_a_matrix_larger_than_the_pool_is_drawn_in_windows() -> None:
    tensors = DrawnTensors()
    tensors.require("embed_tokens.weight", (151_936, 2048))
    part = tensors.matrix("embed_tokens.weight").columns(0, 3)
    assert part.shape == (151_936, 3) and np.isfinite(part).all()
    assert len(np.unique(part[::500, 0])) > 250


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_decoder_is_written_from_drawn_weights(small: None, tmp_path: Path, precision: str) -> None:
    path, shapes = DecoderGraph("any", precision, None)(tmp_path)
    graph = onnx.load(path, load_external_data=False).graph
    assert sum(node.op_type == "Attention" for node in graph.node) == shapes.layers == SMALL.layers
    kinds = {value.data_type for value in graph.initializer}
    assert (onnx.TensorProto.INT4 in kinds) == (precision == "int4")


def test_rows_come_smallest_first() -> None:
    wanted = list(plan(parser().parse_args([])))
    assert [one.title for one in wanted] == [
        "mobile-sam image_encoder fp16", "mobile-sam mask_decoder fp16", "sam-vit-b image_encoder fp16",
        "sam-vit-b mask_decoder fp16", "qwen2_5_vl-3B decoder int4", "qwen2_5_vl-3B decoder fp16",
    ]  # fmt: skip
    assert not list(plan(parser().parse_args(["--segmenters", "none", "--precision", "none"])))


@pytest.mark.parametrize("words", [["--segmenters", "sam-vit-z"], ["--precision", "fp8"], ["--save", "a/b"]])
def test_unknown_names_are_refused(words: list[str]) -> None:
    assert bench.main(words) == UsageError.exit_code


def built(**changes: Any) -> Built:
    kernels = tuple(
        Kernel(name, "kgen", reads, writes)
        for name, reads, writes in (
            ("write_myl0_0", ("k_cache_out_0",), ("k_cache_out_0",)),
            ("write_v_myl0_1", ("v_cache_out_0",), ("v_cache_out_0",)),
            ("mha_myl0_2", ("k_cache_out_0", "v_cache_out_0"), ("y",)),
        )
    )
    held: dict[str, Any] = {
        "flavour": "tensorrt_rtx", "version": "1", "bytes": 7_000_000, "native": {"ROTARY_EMBEDDING": 1},
        "kernels": kernels, "activation_bytes": 1, "weight_bytes": 2, "seconds": 3.5, "peak_bytes": 9_000_000,
    }  # fmt: skip
    return Built(**{**held, **changes})


def stub(folder: Path) -> tuple[Path, Shapes]:
    graph = folder / "decoder.onnx"
    graph.write_bytes(b"graph")
    shapes = Shapes(8, 0, (0, 0), 0, 0, 1, 1, 2, 4, 5, 1.0, (), (0, 0), (0, 0), 0)
    return graph, shapes


def test_every_row_is_saved_and_a_failure_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(job: Any, progress: Any) -> Built:
        if job.precision == "fp16":
            raise EngineError("out of memory")
        return built()

    rows = [Wanted("m", "decoder", "int4", stub), Wanted("m", "decoder", "fp16", stub)]
    monkeypatch.setattr(bench, "plan", lambda options: iter(rows))
    monkeypatch.setattr(bench.engines, "run", run)
    monkeypatch.setattr(bench.engines, "choose", lambda *a: (TensorRT(None, "tensorrt_rtx", "1"), "sm_89"))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert bench.main(["--save", "e"]) == EngineError.exit_code
    told = json.loads((tmp_path / "e.json").read_text())
    first, second = told["engines"]
    assert first["cache_in_place"] is True and first["peak_memory_mb"] == 9
    assert first["kernels"] == [3] and first["attention_kernels"] == [1]
    assert second == {"engine": "m decoder fp16", "error": "out of memory"}
    assert "built, not executed" in told["note"].lower()
    assert "not built: m decoder fp16" in capsys.readouterr().err
    assert line(second).endswith("not built: out of memory")


def test_a_small_decoder_is_measured(small: None, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install '.[tensorrt]'")
    row = measure(Wanted("small", "decoder", "int4", DecoderGraph("any", "int4", None)), "sm_89", tmp_path)
    assert row["cache_in_place"] is True and row["layers"] == SMALL.layers
    assert row["attention_kernels"] == [SMALL.layers] * 2
    assert row["native_layers"]["KV_CACHE_UPDATE"] == 2 * SMALL.layers
    assert row["bytes"] > 0 and row["seconds"] > 0
