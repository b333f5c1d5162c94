"""Who may import whom (the rooms of the design), read from the sources' own import statements."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ppcr", "export", "kernels", "runtime", "benchmarks")
STDLIB = frozenset(sys.stdlib_module_names)

ENGINES = frozenset(
    {"onnxruntime", "onnxruntime_genai", "openvino", "tensorrt", "tensorrt_llm", "tensorrt_rtx"}
)
TRAINED_WITH = frozenset({"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "matplotlib", "triton"})

# Room of a module -> the other rooms it may import (its own is understood) and the libraries it may import,
# function bodies included. None: any library.
WORDS_LIBRARIES = frozenset({"PIL", "cykooz_resizer", "numpy", "safetensors", "tokenizers"})
ROOMS: dict[str, tuple[frozenset[str], frozenset[str] | None]] = {
    "words": (frozenset(), WORDS_LIBRARIES),
    "ppcr.model": (frozenset({"words", "kernels"}), None),
    # A command beside the words: nothing imports it.
    "ppcr.compose": (frozenset({"words", "ppcr.model"}), None),
    "ppcr.data": (frozenset({"words", "ppcr.model"}), None),
    "ppcr.training": (frozenset({"words", "ppcr.model", "ppcr.data", "ppcr.evaluation"}), None),
    "ppcr.evaluation": (frozenset({"words", "ppcr.model", "ppcr.data"}), None),
    "kernels": (frozenset(), frozenset({"torch", "triton", "numpy"})),
    "export": (
        frozenset({"words", "ppcr.model", "ppcr.data", "ppcr.evaluation", "kernels", "runtime"}),
        None,
    ),
    "runtime": (frozenset({"words"}), WORDS_LIBRARIES | ENGINES | {"cuda"}),
    # The one engine that reads the checkpoint and not the graphs: torch's.
    "runtime.torch": (
        frozenset({"words", "runtime", "ppcr.model", "kernels"}),
        WORDS_LIBRARIES | {"torch", "transformers"},
    ),
    "benchmarks": (
        frozenset({"words", "ppcr.model", "ppcr.data", "ppcr.evaluation", "kernels", "runtime", "export"}),
        None,
    ),
}

# Rooms of the design that may still be empty.
LATER = frozenset({"ppcr.evaluation"})

# What importing these (and, with them, everything they import at module level) must not load.
LIGHT: dict[str, frozenset[str]] = {
    "ppcr": TRAINED_WITH | ENGINES,
    "ppcr.cli": TRAINED_WITH | ENGINES | WORDS_LIBRARIES,
    "runtime": TRAINED_WITH | ENGINES,
    "runtime.pipeline": TRAINED_WITH | ENGINES,
    "runtime.infer": TRAINED_WITH | ENGINES,
    "ppcr.compose": TRAINED_WITH | ENGINES,
    "kernels": frozenset({"torch", "triton", "transformers"}),
    "kernels.op": frozenset({"triton", "transformers"}),
    "kernels.token_op": frozenset({"triton", "transformers"}),
    "export.build_engines": ENGINES - {"onnxruntime"} | {"triton", "matplotlib"},
    "benchmarks.latency": ENGINES - {"onnxruntime"} | {"triton", "matplotlib"},
    "benchmarks.accuracy": ENGINES - {"onnxruntime"} | {"triton", "matplotlib"},
}


@dataclass(frozen=True)
class Import:
    """One imported module: its dotted name, its line, and whether the statement runs on import."""

    name: str
    line: int
    at_module_level: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of the packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    parts = module.split(".")
    if module.startswith("runtime.torch_"):
        return "runtime.torch"
    if parts[0] != "ppcr":
        return parts[0]
    inner = ".".join(parts[:2])
    return inner if inner in ROOMS else "words"


def parse_imports(source: str, module: str, is_package: bool) -> list[Import]:
    """Every import of a module, those inside functions and `import_module("literal")` included.

    Imports under `if TYPE_CHECKING:` are left out: they never run.
    """
    found: list[Import] = []

    def visit(node: ast.AST, at_module_level: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.orelse:
                visit(statement, at_module_level)
            return
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_module_level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                anchor = parts[: len(parts) - node.level + is_package]
                base = ".".join([*anchor, base]) if base else ".".join(anchor)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.append(Import(inner if inner in modules() else base, node.lineno, at_module_level))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                found.append(Import(node.args[0].value, node.lineno, at_module_level))
        inside_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, at_module_level and not inside_function)

    visit(ast.parse(source), True)
    return found


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    path = modules()[module]
    return tuple(parse_imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"))


def loaded_by(module: str) -> Iterator[tuple[str, Import]]:
    """Every import that importing `module` runs, with the module that states it: the module-level closure."""
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        while name and name not in modules():
            name = name.rpartition(".")[0]
        if not name or name in seen:
            continue
        seen.add(name)
        waiting.append(name.rpartition(".")[0])
        for item in imports_of(name):
            if item.at_module_level:
                yield name, item
                waiting.append(item.name)


def where(module: str, item: Import) -> str:
    return f"{modules()[module].relative_to(ROOT)}:{item.line} imports {item.name}"


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_what_it_may(room: str) -> None:
    rooms, libraries = ROOMS[room]
    wrong = []
    members = [module for module in modules() if room_of(module) == room]
    for module in members:
        for item in imports_of(module):
            if item.top in STDLIB:
                continue
            if item.top in PACKAGES:
                allowed = room_of(item.name) in rooms | {room}
            else:
                allowed = libraries is None or item.top in libraries
            if not allowed:
                wrong.append(where(module, item))
    if not members and room in LATER:
        pytest.skip(f"{room} has no module yet")
    assert members, f"no module in {room}"
    assert not wrong


@pytest.mark.parametrize("module", LIGHT)
def test_import_loads_no_heavy_library(module: str) -> None:
    if module not in modules() and room_of(module) in LATER:
        pytest.skip(f"{module} is not there yet")
    assert module in modules()
    assert not [where(stated_in, item) for stated_in, item in loaded_by(module) if item.top in LIGHT[module]]


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_runtime_names_each_engine_in_one_file(engine: str) -> None:
    users = {
        module
        for module in modules()
        if room_of(module) == "runtime" and any(item.top == engine for item in imports_of(module))
    }
    assert len(users) <= 1, f"{engine} is imported by {sorted(users)}"


@pytest.mark.parametrize("package", [name for name in PACKAGES[1:] if (ROOT / name).is_dir()])
def test_no_module_carries_the_name_of_a_library(package: str) -> None:
    # `python export/build_engines.py` starts with export/ itself on the path, where such a module would
    # be found in place of the library.
    libraries = STDLIB | {
        name for name in importlib.metadata.packages_distributions() if name not in PACKAGES
    }
    names = {path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not (names - {"__init__", "__pycache__", "__main__"}) & libraries


def test_the_reader_sees_every_kind_of_import() -> None:
    source = (
        "from __future__ import annotations\nimport torch\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import onnx\nelse:\n    import triton\n"
        "try:\n    import tensorrt\nexcept ImportError:\n    pass\n"
        "class A:\n    import scipy\n    def f(self):\n        from . import infer\n        import openvino\n"
        "def g():\n    import_module('onnxruntime')\n"
    )
    found = {item.name: item.at_module_level for item in parse_imports(source, "runtime.pipeline", False)}
    assert found == {
        "__future__": True, "torch": True, "typing": True, "triton": True, "tensorrt": True, "scipy": True,
        "runtime.infer" if "runtime.infer" in modules() else "runtime": False,
        "openvino": False, "onnxruntime": False,
    }  # fmt: skip


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)


@pytest.mark.parametrize("module", ["runtime", "runtime.pipeline", "runtime.infer", "ppcr", "ppcr.cli"])
def test_process_stays_free_of_torch(module: str) -> None:
    heavy = sorted(TRAINED_WITH)
    run = run_python(f"import {module}, sys; print(*[name for name in {heavy} if name in sys.modules])")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_runtime_imports_where_torch_is_not_installed() -> None:
    # A module made for an optional engine may need that engine; the base install need not have it.
    optional = ENGINES - {"onnxruntime"} | {"torch"}
    names = [
        module
        for module in modules()
        if room_of(module) in ("runtime", "words")
        and not optional & {item.top for item in imports_of(module)}
    ]
    assert "runtime.pipeline" in names
    run = run_python(
        f"import importlib, sys\nfor name in {sorted(TRAINED_WITH)}: sys.modules[name] = None\n"
        f"for name in {names}: importlib.import_module(name)"
    )
    assert run.returncode == 0, run.stderr


def test_transformers_does_not_take_our_kernels_for_the_hub_package() -> None:
    # transformers imports whatever is called `kernels` to learn whether it is the hub package of that name.
    run = run_python(
        "import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl\n"
        "from transformers.utils import is_kernels_available\nprint(is_kernels_available())"
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-1] == "False"
