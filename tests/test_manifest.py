"""A manifest: what it says comes back; a directory that does not fit it is refused, with the cure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ppcr.errors import BundleError
from ppcr.manifest import COMMON, DATA, MANIFEST, ROLES, FileEntry, Manifest, Parity, Shapes, files_below

SHAPES = Shapes(
    max_length=384, image_tokens=64, grid=(8, 8), patches=256, patch_dim=384, layers=6, kv_heads=2,
    head_dim=64, hidden=256, vocabulary=1600, rope_theta=10.0, mrope_section=(8, 12, 12),
    image_size=(256, 256), mask_size=(128, 128), max_text=64,
)  # fmt: skip


def fp32(role: str) -> str:
    return f"graphs/{role}.onnx"


BESIDE = fp32("image_encoder") + DATA


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle whose graphs are a few bytes each."""
    root = tmp_path / "bundle"
    names = [*COMMON, *map(fp32, ROLES), "graphs/decoder.int8.onnx", BESIDE]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode() * 3)
    roles = {role: fp32(role) for role in ROLES}
    Manifest(
        name="test",
        source="0" * 64,
        target="cpu",
        opset=24,
        tools={"onnxruntime": "1.30.0"},
        box_convention="loc1000",
        precisions={"fp32": roles, "int8": {**roles, "decoder": "graphs/decoder.int8.onnx"}},
        files={name: FileEntry.of(root / name) for name in names},
        shapes=SHAPES,
        default_precision="fp32",
        parity={"fp32": Parity(64, 1.0, 0.9999, 0.999, True)},
    ).save(root)
    return root


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(json.dumps(data))


def test_what_was_saved_comes_back(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    manifest.verify(bundle)
    manifest.verify(bundle, "int8")
    assert manifest.shapes == SHAPES
    assert manifest.parity["fp32"].passed
    assert manifest.paths() == manifest.paths("fp32")
    assert manifest.paths("int8")["decoder"] == "graphs/decoder.int8.onnx"
    again = replace(manifest, parity_failure_allowed=True)
    again.save(bundle)
    assert Manifest.load(bundle) == again != manifest


def test_missing_file_is_named(bundle: Path) -> None:
    (bundle / fp32("vision")).unlink()
    with pytest.raises(BundleError, match=r"lacks graphs/vision\.onnx.*build it again"):
        Manifest.load(bundle).verify(bundle, "fp32")


@pytest.mark.parametrize("precision", ["fp32", None])
def test_changed_file_is_named(bundle: Path, precision: str | None) -> None:
    path = bundle / fp32("decoder")
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(BundleError, match=r"decoder\.onnx is not the file"):
        Manifest.load(bundle).verify(bundle, precision)


@pytest.mark.parametrize("precision", ["fp32", "int8", None])
def test_weights_beside_a_graph_belong_to_it(bundle: Path, precision: str | None) -> None:
    """Of the same size, without a role of their own, and yet a changed or a missing file is found."""
    path = bundle / BESIDE
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"image_encoder\.onnx\.data is not the file.*build it again"):
        Manifest.load(bundle).verify(bundle, precision)
    path.unlink()
    with pytest.raises(BundleError, match=r"lacks graphs/image_encoder\.onnx\.data: build it again"):
        Manifest.load(bundle).verify(bundle, precision)


def test_file_of_another_precision_is_checked_by_size_alone(bundle: Path) -> None:
    path = bundle / "graphs/decoder.int8.onnx"
    path.write_bytes(b"x" * path.stat().st_size)
    manifest = Manifest.load(bundle)
    manifest.verify(bundle, "fp32")
    with pytest.raises(BundleError, match="int8"):
        manifest.verify(bundle, "int8")
    path.write_bytes(b"short")
    with pytest.raises(BundleError, match="int8"):
        manifest.verify(bundle, "fp32")


def test_foreign_file_is_named_but_hidden_ones_are_not(bundle: Path) -> None:
    (bundle / ".DS_Store").write_bytes(b"")
    Manifest.load(bundle).verify(bundle)
    (bundle / "graphs/extra.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"extra\.onnx does not belong"):
        Manifest.load(bundle).verify(bundle)
    assert ".DS_Store" not in files_below(bundle)


def test_another_target_and_precision_are_refused(bundle: Path) -> None:
    with pytest.raises(BundleError, match="'cpu', not for 'sm_90'"):
        Manifest.load(bundle, target="sm_90")
    with pytest.raises(BundleError, match="holds fp32, int8, not 'fp16'"):
        Manifest.load(bundle).paths("fp16")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(format=2), "format 2"),
        (lambda d: d.update(ppcr="9.1.0"), "built by ppcr '9.1.0'"),
        (lambda d: d.pop("shapes"), "shapes"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d["shapes"].pop("layers"), "layers"),
        (lambda d: d["shapes"].update(layers=[]) or d.update(files=[]), "does not fit"),
        (lambda d: d["shapes"].update(head_dim="x"), "head_dim is 'x', not a whole number"),
        (lambda d: d["shapes"].update(layers=True), "layers is True"),
        (lambda d: d["shapes"].update(grid=[8]), "not 2 numbers"),
        (lambda d: d["shapes"].update(rope_theta=None), "rope_theta is None, not a number"),
        (lambda d: d["shapes"].update(mrope_section=[8, "y"]), "mrope_section"),
        (lambda d: d["parity"]["fp32"].update(passed="yes"), "not true or false"),
        (lambda d: d["files"]["tokenizer.json"].update(bytes=1.5), "bytes is 1.5"),
        (lambda d: d.update(tools={"onnx": 1}), "tools is .*, not an object"),
        (lambda d: d.update(engines=[{"role": "decoder"}]), "does not fit"),
        (lambda d: d["precisions"]["fp32"].pop("vision"), "roles of fp32"),
        (lambda d: d["precisions"]["fp32"].update(vision="../vision.onnx"), "vision.onnx"),
        (lambda d: d["files"].update({"/etc/passwd": {"sha256": "0", "bytes": 1}}), "passwd"),
        (lambda d: d["files"].pop("tokenizer.json"), "tokenizer.json"),
        (lambda d: d.update(default_precision="int4"), "int4"),
        (lambda d: d["parity"].update(int8={"scenes": 1}), "does not fit"),
    ],
)
def test_manifest_that_does_not_fit_is_refused(
    bundle: Path, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    edit(bundle, change)
    with pytest.raises(BundleError, match=said) as caught:
        Manifest.load(bundle)
    assert "--force" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'"text"'])
def test_damaged_manifest_is_refused(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match="manifest"):
        Manifest.load(bundle)


def test_no_bundle_at_all_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="build_engines"):
        Manifest.load(tmp_path / "nowhere")
