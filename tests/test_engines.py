"""TensorRT engines built without a GPU: what was fused, how often, where the cache is written; and refusals.

Building needs tensorrt_rtx, which compiles for GPUs that are not there. Nothing here executes an engine.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from functools import cache
from pathlib import Path

import onnx
import pytest

from export import engines
from export.attention_function import inlined
from export.build_engines import main
from export.engine_job import Job, attach_timings
from export.engine_layers import Built, Kernel, cache_is_in_place
from export.extend import held_files, link_files
from ppcr.errors import BundleError, EngineError, UsageError
from ppcr.manifest import ROLES, EngineEntry, Manifest
from runtime import tensorrt_library
from runtime.tensorrt_library import TensorRT

ROOT = Path(__file__).resolve().parents[1]
BUILDS_FOR = ("sm_80", "sm_89", "sm_120")


@pytest.fixture(scope="session")
def rtx() -> TensorRT:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install '.[tensorrt]'")
    library = tensorrt_library.find()
    if not library.is_rtx:
        pytest.skip(f"{library.title} comes first here, and builds for the GPU it runs on alone")
    return library


@pytest.fixture(scope="session")
def made(rtx: TensorRT, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the demo bundle that collects engines."""
    return Path(shutil.copytree(bundle, tmp_path_factory.mktemp("engines") / "tiny"))


@cache
def build(bundle: Path, target: str) -> dict[str, Built]:
    assert main(["--output", str(bundle), "--target", target]) == 0
    entries = Manifest.load(bundle).engine_set(target, "fp16")
    layers = {role: bundle / entry.file.replace(".engine", ".layers.json") for role, entry in entries.items()}
    return {role: Built.from_dict(json.loads(path.read_text())) for role, path in layers.items()}


def operators(bundle: Path, role: str) -> Counter[str]:
    model = inlined(onnx.load(bundle / Manifest.load(bundle).paths("fp32")[role], load_external_data=False))
    return Counter(node.op_type for node in model.graph.node)


def attentions(kernels: tuple[Kernel, ...]) -> list[Kernel]:
    return [kernel for kernel in kernels if kernel.is_attention]


@pytest.mark.parametrize("target", BUILDS_FOR)
class TestBuilt:
    """The engines of one target, from the builder's final layer list."""

    def test_decoder_has_native_layers(self, made: Path, target: str) -> None:
        native, graph = build(made, target)["decoder"].native, operators(made, "decoder")
        layers = Manifest.load(made).shapes.layers
        assert native["ATTENTION_INPUT"] == graph["Attention"] == layers
        assert native["KV_CACHE_UPDATE"] == graph["TensorScatter"] == 2 * layers
        assert native["ROTARY_EMBEDDING"] == graph["RotaryEmbedding"] >= layers

    def test_cache_is_updated_in_place(self, made: Path, target: str) -> None:
        decoder, layers = build(made, target)["decoder"], Manifest.load(made).shapes.layers
        assert decoder.pieces == (0, 1)
        assert cache_is_in_place(decoder, layers)
        # One kernel that copied a cache first would be noticed.
        copy = Kernel("copy_myl0_99", "kgen", ("k_cache_0",), ("k_cache_out_0",))
        assert not cache_is_in_place(dataclasses.replace(decoder, kernels=(*decoder.kernels, copy)), layers)

    def test_step_reads_the_cache_itself(self, made: Path, target: str) -> None:
        # Not a copy of keys and values spread out to every query head, as the block of tokens makes.
        decoder = build(made, target)["decoder"]
        found = attentions(decoder.piece(0))
        assert len(found) == Manifest.load(made).shapes.layers
        for layer, kernel in enumerate(found):
            assert {f"k_cache_out_{layer}", f"v_cache_out_{layer}"} <= set(kernel.reads)

    def test_step_has_few_kernels(self, made: Path, target: str) -> None:
        decoder, layers = build(made, target)["decoder"], Manifest.load(made).shapes.layers
        assert decoder.pieces == (0, 1)
        step, block = (len(decoder.piece(piece)) for piece in decoder.pieces)
        assert step <= 9 * layers + 4
        assert step < block

    @pytest.mark.parametrize("role", ROLES)
    def test_attention_is_one_kernel(self, made: Path, target: str, role: str) -> None:
        built, graph = build(made, target)[role], operators(made, role)
        wanted = graph["Attention"] or graph["Softmax"]
        assert wanted
        for piece in built.pieces:
            assert len(attentions(built.piece(piece))) == wanted

    @pytest.mark.parametrize("role", ROLES)
    def test_kernels_are_fewer_than_operators(self, made: Path, target: str, role: str) -> None:
        built = build(made, target)[role]
        assert 0 < len(built.piece(0)) < sum(operators(made, role).values()) / 2
        assert built.weight_bytes > 0 and built.activation_bytes > 0

    def test_manifest_knows_them(self, made: Path, rtx: TensorRT, target: str) -> None:
        build(made, target)
        manifest = Manifest.load(made)
        manifest.verify(made)
        for role, entry in manifest.engine_set(target).items():
            assert (entry.role, entry.target, entry.precision) == (role, target, "fp16")
            assert (entry.flavour, entry.version) == (rtx.flavour, rtx.version)
            assert entry.onnx_sha256 == manifest.files[entry.onnx].sha256
            assert entry.file.startswith(f"engines/{target}/")
            assert manifest.files[entry.file].bytes == (made / entry.file).stat().st_size > 100_000
            assert entry.bytes_on_gpu > 1_000_000


@pytest.mark.parametrize("precision", ["int8", "int4", "bf16"])
def test_decoder_at_other_precisions(rtx: TensorRT, bundle: Path, tmp_path: Path, precision: str) -> None:
    manifest = Manifest.load(bundle)
    job = engines.make_job(manifest, bundle, "decoder", "sm_89", precision, str(tmp_path / "d.engine"))
    told = list[str]()
    built = engines.run(job, told.append)
    assert (tmp_path / "d.engine").stat().st_size == built.bytes
    steps = [re.fullmatch(r"(.+) (\d+)/(\d+)", line) for line in told]
    assert steps and all(step and int(step[2]) <= int(step[3]) for step in steps), "no progress was told"
    folded = operators(bundle, "decoder")["MatMul"] - 1  # all but the head
    assert built.native.get("DEQUANTIZE", 0) == (0 if precision == "bf16" else folded)
    # Folded weights stay folded on the GPU, and both pieces share them; whole ones are there twice.
    whole = (
        2
        * 2
        * sum(
            value.dims[0] * value.dims[1]
            for value in onnx.load(manifest_graph(bundle)).graph.initializer
            if len(value.dims) == 2
        )
    )
    share = {"bf16": (0.9, 1.1), "int8": (0.25, 0.4), "int4": (0.12, 0.25)}[precision]
    assert share[0] * whole < built.weight_bytes < share[1] * whole


def test_weights_may_be_streamed(rtx: TensorRT, bundle: Path, tmp_path: Path) -> None:
    manifest, place = Manifest.load(bundle), str(tmp_path / "d.engine")
    job = engines.make_job(manifest, bundle, "decoder", "sm_89", "fp16", place, ("weight-streaming",))
    built = engines.run(job, lambda told: None)
    assert (tmp_path / "d.engine").stat().st_size == built.bytes > 0
    assert not Path(job.timings or "").exists(), f"{rtx.title} times no kernels"


def manifest_graph(bundle: Path) -> Path:
    return bundle / Manifest.load(bundle).paths("fp32")["decoder"]


def test_failed_build_leaves_the_bundle_as_it_was(
    rtx: TensorRT, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Without a GPU this library cannot finish an engine without weights: a failure in the midst of a build.
    copy = shutil.copytree(bundle, tmp_path / "tiny")
    before = contents(copy)
    options = ["--output", str(copy), "--target", "sm_89", "--strip-weights"]
    code = main(options)
    if code == 0:
        pytest.skip("there is a GPU here, and the engine was built")
    assert code == EngineError.exit_code
    assert "cannot build vision.onnx for sm_89" in error_of(capsys)
    assert contents(copy) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_build_leaves_the_bundle_as_it_was(
    rtx: TensorRT, bundle: Path, tmp_path: Path, number: signal.Signals
) -> None:
    copy = shutil.copytree(bundle, tmp_path / "tiny")
    before = contents(copy)
    process = subprocess.Popen(
        [sys.executable, "export/build_engines.py", "--output", str(copy), "--target", "sm_80"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            if list(tmp_path.glob(".tiny*/engines/sm_80")) and children(process.pid):
                break
            time.sleep(0.02)
        workers = children(process.pid)
        assert process.poll() is None and workers, "the build ended before it could be interrupted"
        os.kill(process.pid, number)
        _, error = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], error
    assert "Traceback" not in error
    assert contents(copy) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    # A worker caught before its parent knew of it finds no job to read, and ends by itself.
    while time.monotonic() < deadline and any(Path(f"/proc/{worker}").exists() for worker in workers):
        time.sleep(0.1)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        p.relative_to(folder).as_posix(): (p.stat().st_size, p.stat().st_ino)
        for p in folder.rglob("*")
        if p.is_file()
    }


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--target", "sm_90"], "builds for sm_80, sm_86, sm_89, sm_120, not for sm_90"),
        (["--target", "sm_89", "--version-compatible"], "lean runtime"),
        (["--target", "sm_80", "--precision", "fp8"], "sm_89 and newer GPUs multiply in fp8, sm_80 does not"),
        (["--target", "sm_89", "--precision", "fp32"], "TensorRT refuses attention in fp32"),
        (["--target", "sm_89", "--precision", "fp16,int4"], "one precision a time"),
        (["--target", "sm_75"], "--help"),
        (["--weight-streaming"], "goes with --target"),
        (["--precision", "fp16"], "exported as fp32, int8, not as"),
    ],
)
def test_refused_at_once(
    rtx: TensorRT, tmp_path: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--output", str(tmp_path / "nothing"), *words]) == UsageError.exit_code
    assert told in error_of(capsys)
    assert not list(tmp_path.iterdir())


def test_current_target_without_a_gpu(
    rtx: TensorRT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> None:
        raise EngineError("there is no GPU here")

    monkeypatch.setattr(engines, "current_device", none)
    assert main(["--output", str(tmp_path / "nothing"), "--target", "current"]) == EngineError.exit_code
    told = error_of(capsys)
    assert "there is no GPU here" in told and "--target sm_89" in told
    assert not list(tmp_path.iterdir())


def library(flavour: str, version: str = "10.16.1") -> TensorRT:
    flags = types.SimpleNamespace(VERSION_COMPATIBLE=0, STRIP_PLAN=1, WEIGHT_STREAMING=2)
    return TensorRT(types.SimpleNamespace(BuilderFlag=flags), flavour, version)


def test_tensorrt_builds_for_the_gpu_that_is_there() -> None:
    tensorrt = library("tensorrt")
    tensorrt.require_target("sm_90", "sm_90")
    with pytest.raises(UsageError, match="here sm_90.*not for sm_89.*tensorrt_rtx builds for sm_80"):
        tensorrt.require_target("sm_89", "sm_90")
    with pytest.raises(UsageError, match="there is none here"):
        tensorrt.require_target("sm_89", None)
    tensorrt.require_option("version-compatible")


def test_timings_are_kept_where_kernels_are_timed(tmp_path: Path) -> None:
    class Config:
        """A builder's configuration: what it is given comes back when asked for."""

        def create_timing_cache(self, held: bytes) -> bytes:
            return held

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> None:
            assert not ignore_mismatch, "timings of another GPU would be taken for this one's"
            self.cache = cache

    path = tmp_path / "timings.cache"
    job = Job("x.onnx", "x.engine", "sm_90", "fp16", timings=str(path))
    for held in (b"", b"timed before"):
        if held:
            path.write_bytes(held)
        config = Config()
        assert attach_timings(library("tensorrt"), config, job) == held == config.cache
    assert attach_timings(library("tensorrt_rtx"), Config(), job) is None
    assert attach_timings(library("tensorrt"), Config(), dataclasses.replace(job, timings=None)) is None


def test_versions_that_load() -> None:
    tensorrt = library("tensorrt")
    assert tensorrt.loads("tensorrt", "10.16.1")
    assert not tensorrt.loads("tensorrt", "10.15.0")
    assert tensorrt.loads("tensorrt", "10.15.0", ("version-compatible",))
    assert not tensorrt.loads("tensorrt", "11.0.0", ("version-compatible",))
    assert not tensorrt.loads("tensorrt_rtx", "10.16.1")


@pytest.mark.parametrize("kind", ["absent", "stub", "broken"])
def test_no_library_is_one_line(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        if kind == "stub":
            (tmp_path / f"{name}.py").write_text("__version__ = '0.0.1'\n")
        elif kind == "broken":
            (tmp_path / f"{name}.py").write_text("raise OSError('libnvinfer.so.10: cannot open')\n")
        else:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.syspath_prepend(str(tmp_path))
    tensorrt_library.find.cache_clear()
    try:
        with pytest.raises(EngineError) as caught:
            tensorrt_library.find()
    finally:
        tensorrt_library.find.cache_clear()
        for name in ("tensorrt", "tensorrt_rtx"):
            sys.modules.pop(name, None)
    told = {"absent": "is not installed", "stub": "stub without Builder", "broken": "libnvinfer.so.10"}[kind]
    assert str(caught.value).count(told) == 2
    assert "pip install '.[tensorrt]'" in str(caught.value)


def test_sets_of_engines_by_target() -> None:
    def entry(role: str, target: str, precision: str) -> EngineEntry:
        return EngineEntry(role, target, precision, f"{role}.engine", "x.onnx", "0", "tensorrt", "10.16")

    held = tuple(entry(role, "sm_89", p) for p in ("fp16", "int4") for role in ROLES)
    held += (entry("decoder", "sm_80", "fp16"),)
    manifest = types.SimpleNamespace(engines=held, engine_roles=ROLES)
    find = Manifest.engine_set
    assert {e.precision for e in find(manifest, "sm_89").values()} == {"int4"}  # type: ignore[arg-type]
    assert {e.precision for e in find(manifest, "sm_89", "fp16").values()} == {"fp16"}  # type: ignore[arg-type]
    for target, precision in (("sm_80", None), ("sm_120", None), ("sm_89", "bf16")):
        with pytest.raises(BundleError, match=f"build_engines.py --target {target}"):
            find(manifest, target, precision)  # type: ignore[arg-type]


def test_files_that_were_only_linked_keep_their_entry(bundle: Path, tmp_path: Path) -> None:
    # Else a file that changed behind the manifest's back would be taken for good with the next engines.
    copy, part = Path(shutil.copytree(bundle, tmp_path / "tiny")), tmp_path / "part"
    manifest = Manifest.load(copy)
    graph = manifest.paths("fp32")["vision"]
    (copy / graph).write_bytes(b"changed")
    link_files(copy, part)
    (part / "engines").mkdir()
    (part / "engines" / "new.engine").write_bytes(b"engine")
    files = held_files(part, manifest, {"engines/new.engine"})
    assert files[graph] == manifest.files[graph]
    assert set(files) == {*manifest.files, "engines/new.engine"}
    assert files["engines/new.engine"].bytes == 6
    with pytest.raises(BundleError, match="is not the file"):
        dataclasses.replace(manifest, files=files).verify(part)
