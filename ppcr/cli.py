"""The installed ``ppcr`` command: one front for the scripts that also run from the repository root.

Each subcommand is imported only when it is asked for, so ``ppcr infer`` never loads what ``ppcr build``
needs, and works where only the base install is present.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ppcr import __version__
from ppcr.errors import EngineError, UsageError, run_cli


@dataclass(frozen=True)
class Command:
    """Where a subcommand lives, and what it needs beyond the base install: libraries, and their extra."""

    module: str
    summary: str
    needs: tuple[str, ...] = ()
    extra: str = "export"


_REFERENCE = ("torch", "transformers")

COMMANDS: dict[str, Command] = {
    "compose": Command(
        "ppcr.compose", "public weights of an MLLM and a segmenter to a checkpoint", _REFERENCE
    ),
    "build": Command(
        "export.build_engines", "checkpoint to bundle, held to the parity gate", (*_REFERENCE, "onnx")
    ),
    "infer": Command("runtime.infer", "image and expressions to prompts, masks and an overlay"),
    "bench latency": Command("benchmarks.latency", "time of each stage, beside plain torch", _REFERENCE),
    "bench accuracy": Command(
        "benchmarks.accuracy", "accuracy of a bundle on a split of the scenes", ("torch",)
    ),
    "bench segmenter": Command(
        "benchmarks.segmenter", "time of the segmenter by itself, beside plain torch", _REFERENCE
    ),
    "bench kernel": Command("benchmarks.kernel", "the fused attention by itself", ("torch", "triton"), "gpu"),
}


def present() -> dict[str, Command]:
    """The commands whose module this copy of the package holds."""
    return {name: command for name, command in COMMANDS.items() if importlib.util.find_spec(command.module)}


def usage() -> str:
    """The text of ``ppcr --help``."""
    rows = "\n".join(f"  {name:<16}{command.summary}" for name, command in present().items())
    return f"usage: ppcr COMMAND [options]\n\n{rows}\n\nOptions of a command: ppcr COMMAND --help"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code (`ppcr.errors.EXIT_CODES`).

    `argv` are the words after ``ppcr`` (default: the process's own). An unknown command is a usage error;
    a command whose libraries are not installed says which extra brings them.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    return run_cli(lambda: _dispatch(words))


def _dispatch(words: list[str]) -> int:
    if words in (["-h"], ["--help"]):
        print(usage())
        return 0
    if words == ["--version"]:
        print(f"ppcr {__version__}")
        return 0
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in present():
            return _run(name, words[length:])
    given = f"unknown command {' '.join(words[:2])!r}" if words else "no command given"
    raise UsageError(f"{given}; the commands are: {', '.join(present())} (ppcr --help says what each does)")


def _run(name: str, arguments: list[str]) -> int:
    command = COMMANDS[name]
    missing = [library for library in command.needs if importlib.util.find_spec(library) is None]
    if missing:
        cure = f"pip install 'ppcr[{command.extra}]' brings it"
        raise EngineError(f"ppcr {name} needs {', '.join(missing)}, not installed here; {cure}")
    before = sys.argv
    # argparse takes the program's name from here, so that `ppcr infer --help` says `ppcr infer`.
    sys.argv = [f"ppcr {name}", *arguments]
    try:
        code: int = importlib.import_module(command.module).main(arguments)
        return code
    finally:
        sys.argv = before
