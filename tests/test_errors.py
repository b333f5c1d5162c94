"""Exit codes, one-line messages, and what a command does when it is stopped or its output goes away."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from ppcr import errors
from ppcr.errors import ERRORS, EXIT_CODES, OutputError, PPCRError, is_disk_full, one_line, run_cli

ROOT = Path(__file__).resolve().parents[1]


def raiser(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


def start(body: str, stdout: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start Python on `body`, which defines `main`, under `run_cli`."""
    code = f"import sys\nfrom ppcr.errors import run_cli\n{body}\nsys.exit(run_cli(main))"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def test_each_error_has_its_own_documented_code() -> None:
    codes = [error.exit_code for error in ERRORS]
    assert len(set(codes)) == len(codes)
    assert not {0, 1, 130, 141, 143} & set(codes)
    assert {error: error.exit_code for error in ERRORS} == {
        errors.UsageError: 2,
        errors.ImageError: 3,
        errors.ExpressionError: 4,
        errors.BoxError: 5,
        errors.BundleError: 6,
        errors.CheckpointError: 7,
        errors.OutputError: 8,
        errors.ParityError: 9,
        errors.EngineError: 10,
    }
    assert set(EXIT_CODES) == {0, 1, *range(2, 11), 130, 141, 143}
    assert set(PPCRError.__subclasses__()) == set(ERRORS)


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_an_error_is_one_line_and_its_code(kind: type[PPCRError], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(raiser(kind("x is wrong; do y"))) == kind.exit_code
    captured = capsys.readouterr()
    assert captured.err == "error: x is wrong; do y\n"
    assert captured.out == ""


@pytest.mark.parametrize(("answer", "code"), [(None, 0), (0, 0), (7, 7)])
def test_the_answer_of_main_is_the_code(answer: int | None, code: int) -> None:
    assert run_cli(lambda: answer) == code


def test_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(raiser(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_anywhere_is_an_output_error(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(raiser(OSError(number, os.strerror(number)))) == OutputError.exit_code
    assert "free some space" in capsys.readouterr().err


def test_disk_full_is_told_from_other_errors() -> None:
    assert is_disk_full(Exception("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(Exception("No such file or directory (os error 2)"))
    assert not is_disk_full(OSError(errno.EACCES, "denied"))
    assert not is_disk_full(OSError("no number"))


def test_an_unexpected_error_says_how_to_see_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(raiser(ZeroDivisionError("boom"))) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "ZeroDivisionError: boom" in err and "PPCR_DEBUG=1" in err


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PPCR_DEBUG", "1")
    assert run_cli(raiser(errors.BoxError("bad box"))) == 5
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: bad box\n")


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (0, 0), (2, 2), ("gone wrong", 1)])
def test_system_exit_keeps_its_code(code: int | str | None, expected: int) -> None:
    assert run_cli(raiser(SystemExit(code))) == expected


def test_a_message_stays_on_one_printable_line() -> None:
    assert one_line("a\nb\x1b[31m\u202ec") == "a\\nb\\x1b[31m\\u202ec"
    readable = "gr\u00fcn \U0001f534 \u0623\u062d\u0645\u0631"
    assert one_line(readable) == readable
    assert len(one_line("x" * 100_000)) < 3000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_standard_output() -> None:
    with open("/dev/full", "w") as full:
        process = start("def main(): print('result')", full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == OutputError.exit_code
    assert err.count("\n") == 1 and "disk is full" in err


def test_closed_pipe_is_silent() -> None:
    process = start("def main():\n    for i in range(200000): print('a line of output', i)")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "error: interrupted\n"), (signal.SIGTERM, 143, "")],
    ids=["ctrl-c", "sigterm"],
)
def test_a_stopped_build_leaves_nothing(tmp_path: Path, number: int, code: int, message: str) -> None:
    body = f"""
import time, pathlib
from ppcr.files import atomic_directory
def main():
    with atomic_directory({str(tmp_path / "new" / "bundle")!r}) as part:
        (part / "half.bin").write_bytes(b"half")
        pathlib.Path({str(tmp_path / "started")!r}).touch()
        time.sleep(60)
"""
    process = start(body)
    started = tmp_path / "started"
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", message)
    assert list(tmp_path.iterdir()) == [started]
