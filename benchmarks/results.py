"""The result files of ``--save NAME``: benchmarks/results/NAME.json with the command and the machine.

A benchmark that keeps every single run writes them to NAME.csv beside it, under the same lines as comments.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ppcr.errors import UsageError
from ppcr.files import write_json, write_text

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
    command = _command(script, words)
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", {"command": command, "machine": dict(machine), **record})
    print(f"results  {RESULTS.parent.name}/{RESULTS.name}/{name}.json")


def save_runs(
    name: str,
    script: str,
    words: Sequence[str],
    machine: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
) -> None:
    """Write ``runs``, which share their keys, as CSV; command and machine precede them in lines with "#".

    Raises:
        OutputError: the file cannot be written.
    """
    out = io.StringIO()
    for key, value in {"command": _command(script, words), **machine}.items():
        out.write(f"# {key}: {value}\n")
    table = csv.DictWriter(out, list(runs[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(runs)
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / f"{name}.csv", out.getvalue())
    print(f"runs     {RESULTS.parent.name}/{RESULTS.name}/{name}.csv")


def _command(script: str, words: Sequence[str]) -> str:
    return shlex.join(["python", f"benchmarks/{script}", *words])
