"""What an installed copy holds: every package, the shipped checkpoint and samples, and nothing heavy."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ppcr.cli import COMMANDS, main, present
from ppcr.errors import EXIT_CODES, EngineError, UsageError

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ppcr", "export", "kernels", "runtime", "benchmarks")
HEAVY = {"torch", "transformers", "onnx", "onnxscript", "matplotlib", "triton", "pytest"}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def shipped_files() -> set[str]:
    """Every file of the packages that an installed copy must hold, as posix paths from the root."""
    sources = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    assets = (path for path in (ROOT / "ppcr" / "assets").rglob("*") if path.is_file())
    return {
        path.relative_to(ROOT).as_posix() for path in (*sources, *assets) if "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources (so that no build folder is left in the tree), built offline."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed, and a wheel is built here without a network")
    version = tuple(int(part) for part in importlib.metadata.version("setuptools").split(".")[:1])
    if version < (77,):
        pytest.skip(f"setuptools {version[0]} does not read the licence of pyproject.toml (77 does)")
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*(package for package in PACKAGES if (ROOT / package).is_dir()), "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run([*pip, "-w", "out", "."], cwd=source, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    (built,) = (source / "out").glob("ppcr-*.whl")
    return built


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_wheel_holds_packages_checkpoint_and_samples(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == shipped_files()
    for name in ("config.json", "MODEL_CARD.md", "mllm/config.json", "segmenter/model.safetensors"):
        assert f"ppcr/assets/ppcr-tiny/{name}" in names
    assert "ppcr/assets/samples/samples.json" in names


def test_wheel_carries_licence_and_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    texts = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
    assert "Apache License" in archive.read(texts["licenses/LICENSE"]).decode()
    assert "ppcr = ppcr.cli:main" in archive.read(texts["entry_points.txt"]).decode()
    metadata = archive.read(texts["METADATA"]).decode()
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, re.M)
    assert required
    assert not {name.lower() for name in required} & HEAVY


def test_installed_copy_runs_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys\nfor name in {sorted(HEAVY)}: sys.modules[name] = None\n"
        "import runtime.pipeline, ppcr.cli\nprint(runtime.pipeline.__file__)\n"
        "raise SystemExit(ppcr.cli.main(['infer', '--help']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    assert Path(run.stdout.splitlines()[0]).is_relative_to(site)
    assert "usage: ppcr infer" in run.stdout


def test_base_dependencies_are_the_runtime_alone(project: dict[str, Any]) -> None:
    base = {re.match(r"[\w-]+", line)[0].lower() for line in project["project"]["dependencies"]}  # type: ignore[index]
    assert not base & HEAVY
    assert {"numpy", "pillow", "onnxruntime", "safetensors", "tokenizers"} <= base


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """The constraints: version by name."""
    lines = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def test_constraints_pin_every_direct_dependency_within_its_range(
    project: dict[str, Any], pins: dict[str, str]
) -> None:
    requirements = pytest.importorskip("packaging.requirements")
    extras = project["project"]["optional-dependencies"]
    listed = [*project["project"]["dependencies"], *extras["export"], *extras["train"]]
    listed += [*extras["tensorrt"], *extras["openvino"], *extras["dev"]]
    for requirement in map(requirements.Requirement, listed):
        if requirement.name != "ppcr":
            assert requirement.specifier.contains(pins[requirement.name.lower()]), str(requirement)


def test_constraints_let_each_pinned_package_have_what_it_asks_for(pins: dict[str, str]) -> None:
    """Of those installed at their pin. torch asks for triton only in the build with CUDA, PyPI's."""
    requirements = pytest.importorskip("packaging.requirements")
    asked = 0
    for name, version in pins.items():
        try:
            there = importlib.metadata.version(name).partition("+")[0] == version
        except importlib.metadata.PackageNotFoundError:
            continue
        lines = (importlib.metadata.requires(name) or []) if there else []
        for requirement in map(requirements.Requirement, lines):
            pin = pins.get(requirement.name.lower())
            if pin and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                assert requirement.specifier.contains(pin), f"{name} asks for {requirement}, pinned is {pin}"
                asked += 1
    assert asked > 10


def test_readme_lists_the_exit_codes() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    plain = str.maketrans({"`": None, '"': "'", "\\": None})
    listed = {int(code): meaning.translate(plain) for code, meaning in rows}
    assert listed == {code: meaning.translate(plain) for code, meaning in EXIT_CODES.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_installed_command_leads_to_a_module_of_the_packages(name: str) -> None:
    source = ROOT / (COMMANDS[name].module.replace(".", "/") + ".py")
    if name == "bench kernel" and not source.exists():
        assert name not in present()
        pytest.skip("the kernel benchmark is not written yet, and the command does not offer it")
    functions = {
        node.name: node for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)
    }
    assert [argument.arg for argument in functions["main"].args.args] == ["argv"]


def test_command_says_which_extra_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))
    assert main(["build"]) == EngineError.exit_code
    assert "ppcr[export]" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["bench"], ["bench", "nothing"], ["--infer"]])
def test_unknown_command_is_one_line_and_a_usage_error(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == UsageError.exit_code
    assert capsys.readouterr().err.count("\n") == 1
