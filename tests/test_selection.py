"""Which engine is chosen, what is said of those passed over, and the fallback; engines are fakes."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.util
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ppcr.errors import BundleError, EngineError, UsageError
from ppcr.manifest import Manifest, Parity, parity_key
from runtime import cuda_driver, engine_checks, infer, processor, selection
from runtime.bundle import Bundle
from runtime.pipeline import Pipeline
from runtime.session import BACKENDS, Sessions
from tests import factory

LAST = selection.ENGINES[-1]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without a driver, whatever this one has; tests put one in."""
    monkeypatch.setattr(engine_checks, "first_gpu", refuse("no NVIDIA driver"))
    yield


def refuse(text: str, kind: type[Exception] = EngineError) -> Callable[..., Any]:
    def raising(*_: object, **__: object) -> Any:
        raise kind(text)

    return raising


def installed(monkeypatch: pytest.MonkeyPatch, **there: bool) -> None:
    """Packages that are, or are not, to be found."""
    real = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        return (object() if there[name] else None) if name in there else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def with_parity(folder: Path, **changes: Any) -> Path:
    """A copy of the random bundle with another manifest."""
    shutil.copytree(factory.random_bundle(), folder)
    dataclasses.replace(Manifest.load(folder), **changes).save(folder)
    return folder


def figures(passed: bool) -> Parity:
    return Parity(8, 1.0, 1.0, 1.0, passed)


def started_with(name: str, monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    """Have the engine ``name`` looked at as usable, and started by ``load``."""
    monkeypatch.setitem(selection.CHECKS, name, lambda asked: None)
    monkeypatch.setattr(selection, "engine_precision", lambda n, asked: "fp32")
    real = selection.load_sessions

    def loaded(backend: str, bundle: Bundle, **options: Any) -> Sessions:
        return load(bundle, **options) if backend == name else real(backend, bundle, **options)

    monkeypatch.setattr(selection, "load_sessions", loaded)


def test_every_engine_is_told_of_in_order_and_the_last_is_usable() -> None:
    found = selection.available(factory.random_bundle())
    assert tuple(candidate.name for candidate in found) == selection.ENGINES
    assert set(selection.ENGINES) <= set(BACKENDS)
    assert found[0].reason == "no NVIDIA driver" and str(found[0]) == "tensorrt: no NVIDIA driver"
    assert found[-1].usable and str(found[-1]) == "onnxruntime fp32, ungated"
    for candidate in found:
        assert candidate.usable == (candidate.reason == "")
        assert "\n" not in str(candidate)


def test_a_bundle_and_its_folder_give_the_same_answer() -> None:
    folder = factory.random_bundle()
    assert selection.available(Bundle.load(folder)) == selection.available(folder)
    assert selection.choose(Bundle.load(folder)) == selection.choose(folder)


def test_auto_takes_the_first_usable_one(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, openvino=True)
    assert selection.choose(factory.random_bundle()).name == "openvino"
    installed(monkeypatch, openvino=False)
    assert selection.choose(factory.random_bundle()).name == LAST
    reason = {c.name: c.reason for c in selection.available(factory.random_bundle())}["openvino"]
    assert reason == "openvino not installed: pip install '.[openvino]'"


def test_gates_are_read_by_engine_and_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, openvino=True)
    parity = {"fp32": figures(True), parity_key("openvino", "fp32"): figures(False)}
    folder = with_parity(tmp_path / "bundle", parity=parity)
    found = {candidate.name: candidate for candidate in selection.available(folder)}
    assert found[LAST].gate == "passed" and str(found[LAST]) == "onnxruntime fp32, parity gate passed"
    assert found["openvino"].reason == "at fp32 it failed the parity gate"
    assert selection.choose(folder).name == LAST
    # Named, it runs, and what is known of it is said.
    named = selection.choose(folder, "openvino")
    assert named.usable and str(named) == "openvino fp32, parity gate failed"
    dataclasses.replace(Manifest.load(folder), parity_failure_allowed=True).save(folder)
    assert selection.choose(folder).name == "openvino"


@pytest.mark.parametrize(
    ("parity", "computed"), [({}, "fp32"), ({"bf16": False}, "fp32"), ({"bf16": True}, "bf16")]
)
def test_openvino_takes_bf16_unasked_only_behind_its_gate(
    parity: dict[str, bool], computed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, openvino=True)
    monkeypatch.setattr(engine_checks, "has_bf16", lambda: True)
    held = {parity_key("openvino", name): figures(passed) for name, passed in parity.items()}
    folder = with_parity(tmp_path / "bundle", parity=held)
    assert selection.choose(folder, "openvino").precision == computed
    assert selection.choose(folder, "openvino", precision="bf16").precision == "bf16"
    assert selection.choose(folder, "openvino", precision="int8").precision == "int8"
    with pytest.raises(BundleError, match="not 'bf16'"):
        selection.choose(folder, LAST, precision="bf16")


def test_named_engines_that_cannot_run_are_one_error() -> None:
    with pytest.raises(UsageError, match="'abacus'.*auto, .*onnxruntime"):
        selection.choose(factory.random_bundle(), "abacus")
    with pytest.raises(EngineError, match="'tensorrt' cannot be used here: no NVIDIA driver"):
        selection.choose(factory.random_bundle(), "tensorrt")
    with pytest.raises(BundleError, match="is not a bundle"):
        selection.available(Path("/nonexistent"))


def test_where_nothing_can_run_every_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, openvino=False, onnxruntime=False)
    with pytest.raises(EngineError, match="no NVIDIA driver; .*openvino.*; onnxruntime: .* not"):
        selection.choose(factory.random_bundle())


def test_a_gpu_without_engines_says_how_to_build_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_checks, "first_gpu", lambda: cuda_driver.Gpu("sm_89", 12080))
    installed(monkeypatch, tensorrt=False, tensorrt_rtx=False)
    assert reason_of("tensorrt") == "tensorrt and tensorrt_rtx not installed: pip install '.[tensorrt]'"
    installed(monkeypatch, tensorrt=True, tensorrt_rtx=False)
    assert "no engines for sm_89" in reason_of("tensorrt") and "--target sm_89" in reason_of("tensorrt")


def reason_of(name: str) -> str:
    return {c.name: c.reason for c in selection.available(factory.random_bundle())}[name]


@pytest.mark.parametrize(
    "told",
    [
        "no TensorRT here: tensorrt is installed but cannot be imported (libnvinfer.so.10: cannot open)",
        "the driver is for CUDA 11.4, CUDA 12.8 is needed: install or update the NVIDIA driver",
        "the GPU is out of memory: about 7000 MB are needed, 300 are free",
    ],
)
def test_what_does_not_start_is_passed_over_with_one_warning(
    told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started_with("tensorrt", monkeypatch, refuse(told))
    installed(monkeypatch, openvino=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Pipeline.load(factory.random_bundle(), threads=1) as pipeline:
            result = pipeline.open(factory.picture()).segment("cubes", boxes=[1, 1, 90, 90])
    (warning,) = [w for w in caught if w.category is RuntimeWarning]
    assert str(warning.message) == f"tensorrt: {told}; {LAST} runs instead"
    assert result.engine["engine"] == LAST and result.engine["parity"] == "ungated"
    passed_over = result.engine["passed_over"]
    assert isinstance(passed_over, list) and passed_over[0] == f"tensorrt: {told}"
    assert len(passed_over) == len(selection.ENGINES) - 1
    assert result.to_json()["engine"] == result.engine


@pytest.mark.parametrize(
    "error", ["ImportError('no stub is a library')", "OSError('libx.so: cannot open shared object file')"]
)
def test_a_stub_that_cannot_be_imported_is_passed_over(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openvino.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith("runtime.openvino_")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.warns(RuntimeWarning, match="^openvino: engine 'openvino' cannot be used here: ") as caught:
        with Pipeline.load(factory.random_bundle(), threads=1) as pipeline:
            assert pipeline.engine["engine"] == LAST
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


def test_a_precision_that_nothing_has_is_the_bundles_error() -> None:
    with pytest.raises(BundleError, match="holds fp32, int8, not 'fp4'"):
        selection.choose(factory.random_bundle(), precision="fp4")


def test_a_named_engine_does_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    started_with("tensorrt", monkeypatch, refuse("the engine is cut short", BundleError))
    with pytest.raises(BundleError, match="cut short"):
        Pipeline.load(factory.random_bundle(), threads=1, engine="tensorrt")


def test_a_bug_in_an_engine_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    started_with("tensorrt", monkeypatch, refuse("broken", ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        Pipeline.load(factory.random_bundle(), threads=1)


def test_the_last_engine_tells_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    started_with(LAST, monkeypatch, refuse("no room"))
    installed(monkeypatch, openvino=False)
    with pytest.raises(EngineError, match="^no room$"):
        Pipeline.load(factory.random_bundle(), threads=1)


def test_the_command_line_names_the_engine_and_warns_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(factory.picture()).save(tmp_path / "scene.png")
    command = [
        "--image", str(tmp_path / "scene.png"), "--expression", "a cube", "--box", "1,1,90,90",
        "--bundle", str(factory.random_bundle()), "--output", str(tmp_path / "out"), "--threads", "1",
    ]  # fmt: skip
    started_with("tensorrt", monkeypatch, refuse("no room"))
    installed(monkeypatch, openvino=False)
    assert infer.main(command) == 0
    said = capsys.readouterr()
    assert said.err == f"warning: tensorrt: no room; {LAST} runs instead\n"
    assert f"{LAST} fp32, ungated, 1 threads" in said.out
    assert "  not tensorrt: no room\n" in said.out
    assert infer.main([*command, "--engine", "tensorrt"]) == EngineError.exit_code
    assert capsys.readouterr().err == "error: no room\n"


class Driver:
    """``libcuda.so.1`` as ctypes has it, of a GPU of compute capability 9.0."""

    def __init__(self, *, init: int = 0, count: int = 1, attribute: int = 0) -> None:
        self._init, self._count, self._attribute = init, count, attribute

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self._init

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = self._count
        return 0

    def cuDriverGetVersion(self, out: Any) -> int:
        out._obj.value = 13000
        return 0

    def cuDeviceGetAttribute(self, out: Any, attribute: int, device: int) -> int:
        assert device == 0
        out._obj.value = {75: 9, 76: 0}[attribute]
        return self._attribute


@pytest.mark.parametrize(
    ("driver", "told"),
    [
        (None, "no NVIDIA driver"),
        (Driver(init=100), "no CUDA device"),
        (Driver(count=0), "no CUDA device"),
        (Driver(init=803), "does not work .*803"),
        (Driver(attribute=999), "does not work .*999"),
    ],
)
def test_a_driver_that_is_of_no_use_is_one_line(
    driver: Driver | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookup = refuse("libcuda.so.1: cannot open", OSError) if driver is None else lambda name: driver
    monkeypatch.setattr(ctypes, "CDLL", lookup)
    with pytest.raises(EngineError, match=told):
        cuda_driver.first_gpu.__wrapped__()


def test_a_driver_tells_of_its_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert cuda_driver.first_gpu.__wrapped__() == cuda_driver.Gpu("sm_90", 13000)


def test_the_choice_loads_no_engine_library() -> None:
    code = (
        f"from runtime import selection\nfound = selection.available({str(factory.random_bundle())!r})\n"
        "import sys; print(*[n for n in ('torch', 'tensorrt', 'tensorrt_rtx', 'openvino') "
        "if n in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], text=True, capture_output=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_bf16_is_left_to_processors_that_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, openvino=True)
    folder = with_parity(tmp_path / "bundle", parity={parity_key("openvino", "bf16"): figures(True)})
    for flags, computed in (("fpu avx512f avx512_bf16", "bf16"), ("fpu avx512f", "fp32")):
        told = tmp_path / "cpuinfo"
        told.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
        monkeypatch.setattr(processor, "_CPUINFO", told)
        assert selection.choose(folder).precision == computed
    with pytest.raises(EngineError, match="no bfloat16 instructions: use --precision fp32"):
        selection.choose(folder, "openvino", precision="bf16")
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "missing")
    assert not processor.has_bf16()
