"""Loading a bundle: what fits is read as written, what does not is refused with a cure."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ppcr import __version__
from ppcr.errors import BundleError
from ppcr.manifest import EMBEDDING, EMBEDDING_KEY, MANIFEST, PREPROCESS, TOKENIZER, FileEntry, Manifest
from ppcr.model.mllm import TinyMLLM, build_mllm
from runtime.bundle import Bundle
from runtime.positions import Rotary, make_tables, positions, section_of
from runtime.session import load_sessions
from runtime.threads import share_threads
from tests import factory

Change = Callable[[Path], None]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the random bundle to spoil."""
    return shutil.copytree(factory.random_bundle(), tmp_path / "bundle")


def edit_manifest(bundle: Path, **changes: Any) -> None:
    path = bundle / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reseal(bundle: Path, *names: str) -> None:
    """Write the hashes of changed files into the manifest, as a tool that knows the format could."""
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    for name in names:
        entry = FileEntry.of(bundle / name)
        files[name] = {"sha256": entry.sha256, "bytes": entry.bytes}
    edit_manifest(bundle, files=files)


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_bundle_is_read_as_written() -> None:
    folder = factory.random_bundle()
    bundle = Bundle.load(folder)
    assert bundle.precision == "fp32" and bundle.manifest == Manifest.load(folder)
    assert set(bundle.graphs) == {"vision", "decoder", "image_encoder", "mask_decoder"}
    assert all(path.is_file() for path in bundle.graphs.values())
    np.testing.assert_array_equal(bundle.embedding, load_file(folder / EMBEDDING)[EMBEDDING_KEY])
    assert isinstance(bundle.embedding, np.ndarray) and not bundle.embedding.flags.writeable
    assert bundle.tokenizer.encode("the red cube") == factory.tokenizer().encode("the red cube")
    assert bundle.rotary == Rotary(64, 10.0, (8, 12, 12))


def test_precisions_name_their_own_files() -> None:
    bundle = Bundle.load(factory.random_bundle(), precision="int8")
    assert bundle.precision == "int8"
    assert {path.name for path in bundle.graphs.values()} == {
        "vision.int8.onnx", "decoder.int8.onnx", "image_encoder.int8.onnx", "mask_decoder.int8.onnx",
    }  # fmt: skip


def test_auto_takes_the_default_of_the_build(copy: Path) -> None:
    edit_manifest(copy, default_precision="int8")
    assert Bundle.load(copy).precision == "int8"


def test_checking_is_fast() -> None:
    start = time.perf_counter()
    Bundle.load(factory.random_bundle())
    assert time.perf_counter() - start < 1.5


@pytest.mark.parametrize("hidden", [".DS_Store", ".cache/note"])
def test_hidden_files_do_no_harm(copy: Path, hidden: str) -> None:
    (copy / hidden).parent.mkdir(exist_ok=True)
    (copy / hidden).write_text("")
    assert Bundle.load(copy).precision == "fp32"


def remove(name: str) -> Change:
    return lambda bundle: (bundle / name).unlink()


def spoil(name: str) -> Change:
    return lambda bundle: flip_a_byte(bundle / name)


def write(name: str, text: str) -> Change:
    def change(bundle: Path) -> None:
        (bundle / name).write_text(text)

    return change


def tell(**changes: Any) -> Change:
    return lambda bundle: edit_manifest(bundle, **changes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        pytest.param(remove(MANIFEST), "not a bundle", id="no manifest"),
        pytest.param(write(MANIFEST, "{"), "cannot read", id="broken manifest"),
        pytest.param(write(MANIFEST, "[]"), "not a JSON object", id="manifest of another kind"),
        pytest.param(write(MANIFEST, "{}"), "format None", id="empty manifest"),
        pytest.param(tell(format=99), "format 99", id="other format"),
        pytest.param(tell(ppcr="99.0.0"), "99.0.0", id="other version"),
        pytest.param(tell(target="sm_90"), "sm_90", id="other target"),
        pytest.param(tell(shapes={}), "does not fit", id="no shapes"),
        pytest.param(remove("mllm/decoder.onnx"), "lacks mllm/decoder.onnx", id="missing graph"),
        pytest.param(remove("mllm/decoder.int8.onnx"), "lacks", id="missing graph of another precision"),
        pytest.param(remove(TOKENIZER), "lacks tokenizer.json", id="missing tokenizer"),
        pytest.param(spoil("segmenter/mask_decoder.onnx"), "not the file", id="changed graph"),
        pytest.param(spoil(EMBEDDING), "not the file", id="changed embedding"),
        pytest.param(write(PREPROCESS, "{}"), "not the file", id="changed preprocessing"),
        pytest.param(write("mllm/vision.onnx", ""), "not the file", id="emptied graph"),
        pytest.param(write("segmenter/extra.onnx", "x"), "does not belong", id="foreign file"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_cure(copy: Path, change: Change, told: str) -> None:
    change(copy)
    with pytest.raises(BundleError) as caught:
        Bundle.load(copy)
    message = str(caught.value)
    assert told in message and "\n" not in message
    assert "export/build_engines.py" in message


def test_a_patch_release_reads_the_bundle(copy: Path) -> None:
    series = ".".join(__version__.split(".")[:2])
    edit_manifest(copy, ppcr=f"{series}.99")
    assert Bundle.load(copy).manifest.ppcr == f"{series}.99"


def test_a_precision_that_is_not_there_is_refused(copy: Path) -> None:
    with pytest.raises(BundleError, match="fp32, int8"):
        Bundle.load(copy, precision="fp4")


@pytest.mark.parametrize("place", ["nothing", "file"])
def test_what_is_no_folder_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="not a bundle"):
        Bundle.load(tmp_path / place)


def unreadable_graph(bundle: Path) -> None:
    (bundle / "mllm/decoder.onnx").write_bytes(b"not a graph")
    reseal(bundle, "mllm/decoder.onnx")


def unknown_preprocessing(bundle: Path) -> None:
    (bundle / PREPROCESS).write_text('{"format": 1, "mllm": {}, "segmenter": {}, "more": 1}')
    reseal(bundle, PREPROCESS)


def narrow_embedding(bundle: Path) -> None:
    save_file({EMBEDDING_KEY: np.zeros((4, 4), np.float32)}, bundle / EMBEDDING)
    reseal(bundle, EMBEDDING)


def nameless_embedding(bundle: Path) -> None:
    save_file({"other": np.zeros((4, 4), np.float32)}, bundle / EMBEDDING)
    reseal(bundle, EMBEDDING)


def silent_tokenizer(bundle: Path) -> None:
    (bundle / TOKENIZER).write_text("{}")
    reseal(bundle, TOKENIZER)


@pytest.mark.parametrize(
    "change",
    [unreadable_graph, unknown_preprocessing, narrow_embedding, nameless_embedding, silent_tokenizer],
)
def test_well_sealed_nonsense_is_refused(copy: Path, change: Change) -> None:
    change(copy)
    with pytest.raises(BundleError, match=r"build|fetch"):
        load_sessions("onnxruntime", Bundle.load(copy), threads=1)


def test_a_graph_of_a_newer_opset_is_refused(copy: Path) -> None:
    path = copy / "mllm/vision.onnx"
    model = onnx.load(path)
    model.opset_import[0].version = 999
    onnx.save(model, path)
    reseal(copy, "mllm/vision.onnx")
    with pytest.raises(BundleError, match="onnxruntime cannot read"):
        load_sessions("onnxruntime", Bundle.load(copy), threads=1)


def test_positions_are_those_of_the_reference() -> None:
    tokenizer = factory.tokenizer()
    ids = tokenizer.prefix(64) + tokenizer.expression("the red cube")
    model = build_mllm(TinyMLLM(), tokenizer).model
    kinds = torch.tensor([ids]) == tokenizer.image_token
    expected, _ = model.get_rope_index(
        torch.tensor([ids]), mm_token_type_ids=kinds.long(), image_grid_thw=torch.tensor([[1, 16, 16]])
    )
    start = len(tokenizer.before_image)
    places = positions(384, start, (8, 8))
    np.testing.assert_array_equal(places[:, : len(ids)], expected[:, 0].numpy())
    tables = make_tables(384, start, (8, 8), Rotary(64, 10.0, (8, 12, 12)))
    cos, sin = model.language_model.rotary_emb(torch.zeros(1), expected)
    np.testing.assert_allclose(tables.cos[: len(ids)], cos[0, :, :32].numpy(), atol=1e-5)
    np.testing.assert_allclose(tables.sin[: len(ids)], sin[0, :, :32].numpy(), atol=1e-5)


def test_interleaved_sections_alternate() -> None:
    axes = Rotary(16, 10.0, (4, 2, 2), interleaved=True).axes
    assert axes.tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert Rotary(16, 10.0, (4, 2, 2)).axes.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]


def test_masks_show_each_slot_itself_and_what_came_before() -> None:
    mask = make_tables(12, 2, (2, 3), Rotary(16, 10.0, (4, 2, 2))).mask
    np.testing.assert_array_equal(mask, np.arange(12)[None] <= np.arange(12)[:, None])


def test_wrong_measures_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        positions(10, 5, (2, 3))
    with pytest.raises(ValueError, match="do not fill"):
        section_of([8, 8, 8], 64)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("megabytes", [20, 100, 6000])
def test_threads_are_shared(threads: int, megabytes: int) -> None:
    plan = share_threads(threads, megabytes << 20)
    assert plan.vision == plan.decoder == plan.mask_decoder == threads
    assert plan.step == min(threads, 1 + megabytes // 32)
    # The encoder takes what the steps leave, and one thread where they leave none.
    assert plan.image_encoder == max(1, threads - plan.step)
