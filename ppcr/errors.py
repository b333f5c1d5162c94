"""Errors a user can cause, each with its own exit code, and the one place that turns them into one line.

Every message says what is wrong and what to do about it. `run_cli` prints ``error: <message>`` without a
traceback; set ``PPCR_DEBUG=1`` to see the traceback as well.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import ClassVar, NoReturn

DEBUG_VARIABLE = "PPCR_DEBUG"
EXIT_UNEXPECTED = 1
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
EXIT_TERMINATED = 143

_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_MAX_MESSAGE = 2000


class PPCRError(Exception):
    """Base of every error that the user can put right. `exit_code` is documented and stable."""

    exit_code: ClassVar[int] = EXIT_UNEXPECTED
    meaning: ClassVar[str] = "unexpected error (a bug; PPCR_DEBUG=1 shows the traceback)"


class UsageError(PPCRError):
    """Wrong command-line arguments; the same code as argparse."""

    exit_code = 2
    meaning = "wrong command-line arguments"


class ImageError(PPCRError):
    """The input image is missing, corrupt, of an unsupported kind, or too large."""

    exit_code = 3
    meaning = "image missing, corrupt, unsupported or too large"


class ExpressionError(PPCRError):
    """The referring expression, or a given semantic prompt, is empty, too long or malformed."""

    exit_code = 4
    meaning = "expression or semantic prompt empty, too long or malformed"


class BoxError(PPCRError):
    """A box is malformed, degenerate, or outside its image."""

    exit_code = 5
    meaning = "box malformed, degenerate or outside the image"


class BundleError(PPCRError):
    """A bundle is missing, or has a missing, changed or foreign file, another version or another target."""

    exit_code = 6
    meaning = "bundle missing, changed, foreign or of another version"


class CheckpointError(PPCRError):
    """A checkpoint directory is missing, incomplete or of another version."""

    exit_code = 7
    meaning = "checkpoint missing, incomplete or of another version"


class OutputError(PPCRError):
    """The output place cannot be written: no permission, not a folder, or the disk is full."""

    exit_code = 8
    meaning = "output place unwritable or full"


class ParityError(PPCRError):
    """An exported engine does not agree with the torch reference, so the bundle was not shipped."""

    exit_code = 9
    meaning = "exported engine disagrees with the reference (parity gate)"


class EngineError(PPCRError):
    """An engine cannot run here: a package is missing or the device is the wrong one."""

    exit_code = 10
    meaning = "engine package missing or wrong device"


ERRORS: tuple[type[PPCRError], ...] = (
    UsageError, ImageError, ExpressionError, BoxError, BundleError, CheckpointError, OutputError, ParityError,
    EngineError,
)  # fmt: skip

EXIT_CODES: dict[int, str] = {
    0: "success ('none' is a valid answer)",
    EXIT_UNEXPECTED: PPCRError.meaning,
    **{error.exit_code: error.meaning for error in ERRORS},
    EXIT_INTERRUPTED: "interrupted (Ctrl-C)",
    EXIT_BROKEN_PIPE: "the reader of the output went away (as in `| head`)",
    EXIT_TERMINATED: "terminated (SIGTERM)",
}


class CommandParser(argparse.ArgumentParser):
    """An argparse parser whose complaints are one line, as every other error's."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of printing the usage and exiting."""
        raise UsageError(f"{message} (--help shows the options)")


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` means no space, no quota or a file-size limit.

    Rust libraries (safetensors, tokenizers) raise their own types with the number only in the text.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL_ERRNOS
    return any(f"(os error {number})" in str(error) for number in _FULL_ERRNOS)


def run_cli(main: Callable[[], int | None]) -> int:
    """Run a command's `main` and return its exit code (see `EXIT_CODES`); use as ``sys.exit(run_cli(main))``.

    `PPCRError` becomes one line on stderr and its code. Ctrl-C and SIGTERM unwind the stack first, so that
    whatever was half-written is removed. A full disk anywhere becomes `OutputError`'s code.
    """
    try:
        with _terminate_by_unwinding():
            code = main() or 0
            # A full or closed stdout shows only when the buffer is written; ask while it can be reported.
            sys.stdout.flush()
            return code
    except PPCRError as error:
        return _report(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _report("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    except SystemExit as stop:
        return _exit_code_of(stop)
    except Exception as error:
        if is_disk_full(error):
            _discard_stdout()
            return _report("the disk is full; free some space or choose another place", OutputError.exit_code)
        hint = f"; this is a bug, run again with {DEBUG_VARIABLE}=1 for the traceback"
        return _report(f"unexpected {type(error).__name__}: {error}", EXIT_UNEXPECTED, hint)


def one_line(text: str) -> str:
    """`text` as one printable line of bounded length: control and direction characters are escaped."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return line if len(line) <= _MAX_MESSAGE else line[:_MAX_MESSAGE] + "..."


def _report(message: str, code: int, hint: str = "") -> int:
    with suppress(OSError):
        if os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
            traceback.print_exc()
        print(f"error: {one_line(message)}{hint}", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except OSError:
        _discard_stdout()
    return code


def _exit_code_of(stop: SystemExit) -> int:
    if isinstance(stop.code, str):
        return _report(stop.code, EXIT_UNEXPECTED)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        return EXIT_BROKEN_PIPE
    return stop.code or 0


def _discard_stdout() -> None:
    # The interpreter flushes stdout once more on its way out; without this it would fail there, noisily.
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


@contextmanager
def _terminate_by_unwinding() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(EXIT_TERMINATED)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
