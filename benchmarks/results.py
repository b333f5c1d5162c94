"""The result files of ``--save NAME``: benchmarks/results/NAME.json with the command and the machine."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppcr.errors import UsageError
from ppcr.files import write_json

RESULTS = Path(__file__).resolve().parent / "results"


def add_option(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the option --save."""
    parser.add_argument("--save", metavar="NAME", help=f"write {RESULTS.name}/NAME.json as well")


def check_name(name: str | None) -> None:
    """Refuse what is not a plain file name, before anything is measured.

    Raises:
        UsageError: says what a name may hold.
    """
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError("--save takes a plain name of letters, digits, dots, dashes and underscores")


def save(
    name: str, script: str, words: Sequence[str], machine: Mapping[str, Any], record: Mapping[str, Any]
) -> None:
    """Write ``record`` under the command line ``words`` of benchmarks/``script`` and its machine.

    Raises:
        OutputError: the file cannot be written.
    """
    command = shlex.join(["python", f"benchmarks/{script}", *words])
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", {"command": command, "machine": dict(machine), **record})
    print(f"results  {RESULTS.parent.name}/{RESULTS.name}/{name}.json")
