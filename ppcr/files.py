"""Writing so that a reader sees the old file or the new one, never half of one; and file hashes.

A file is written beside its place (`.<name>.<pid>-<n>.part<suffix>`) and renamed into it; a directory is
built beside and renamed as a whole. On any error, Ctrl-C included, what was begun is removed. A place that
cannot be written, or a full disk, raises `OutputError`. JSON objects are read here too.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ppcr.errors import OutputError, PPCRError, is_disk_full

PathLike = str | os.PathLike[str]

_serial = itertools.count()
_CHUNK = 1 << 20


def sha256_file(path: PathLike) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces. Raises OSError when it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_directory(path: PathLike) -> str:
    """Hex SHA-256 over the relative names and the contents of all files below `path`; dates do not count."""
    root = Path(path)
    digest = hashlib.sha256()
    for name in sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()):
        digest.update(f"{sha256_file(root / name)}  {name}\n".encode())
    return digest.hexdigest()


@contextmanager
def atomic_file(path: PathLike) -> Iterator[Path]:
    """Yield a new path beside `path`, with its suffix; what is written there replaces `path` on a clean exit.

    Missing parent folders are made, and removed again on failure. A link is followed, not replaced.
    Raises OutputError when the place cannot be written or is not a regular file (a device, a folder).
    """
    target = _resolve(path)
    if target.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; give a file name")
    if target.exists() and not target.is_file():
        raise OutputError(f"cannot write {path}: it is not a regular file; give another name")
    part = _beside(target, target.suffix)
    with _output_errors(target, part), _made_parents(target):
        try:
            yield part
            _flush_to_disk(part)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: PathLike, *, marker: str | None = None) -> Iterator[Path]:
    """Yield a new, empty directory beside `path`; on a clean exit it becomes `path` as a whole.

    An existing directory is replaced only if it is empty or holds the file `marker`, so that a mistyped
    output folder costs nobody their files. The old directory stays until the new one is complete.
    Raises OutputError when the place cannot be written or holds something else.
    """
    target = _resolve(path)
    if target.exists() and not target.is_dir():
        raise OutputError(f"cannot write {path}: it is a file; give a folder")
    part = _beside(target, "")
    with _output_errors(target, part), _made_parents(target):
        if target.is_dir() and any(target.iterdir()) and not (marker and (target / marker).is_file()):
            told = f" but no {marker}" if marker else ""
            raise OutputError(f"will not replace {path}: it holds files{told}; give a new or empty folder")
        part.mkdir()
        try:
            yield part
            _swap(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def ensured_directory(path: PathLike) -> Iterator[Path]:
    """Make the folder `path` where missing, check that a file can be made in it, and yield it.

    Folders made for it are removed again on failure, where nothing lies in them by then. Raises OutputError.
    """
    target = _resolve(path)
    probe = _beside(target / "probe", "")
    with _output_errors(target, probe), _made_parents(probe):
        try:
            probe.write_bytes(b"")
        finally:
            with suppress(OSError):
                probe.unlink(missing_ok=True)
        yield Path(path)


def write_bytes(path: PathLike, data: bytes) -> None:
    """Write a whole file atomically. Raises OutputError."""
    with atomic_file(path) as part:
        part.write_bytes(data)


def write_text(path: PathLike, text: str) -> None:
    """Write a whole UTF-8 file atomically. Raises OutputError."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: PathLike, value: Any) -> None:
    """Write indented JSON (UTF-8, strict: no NaN) atomically. Raises OutputError; ValueError on a NaN."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: PathLike, error: type[PPCRError], *, missing: str = "", cure: str = "") -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        error: raised when the file cannot be read or holds something else.
        missing: the message where there is no such file (default: that there is none).
        cure: what to do about a file that cannot be used, added to what is wrong with it.
    """
    told = f"; {cure}" if cure else ""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise error(missing or f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"cannot read {path}: {reason}{told}") from None
    if not isinstance(data, dict):
        raise error(f"{path} is not a JSON object{told}")
    return data


def output_error(path: PathLike, error: BaseException) -> OutputError:
    """The OutputError to raise for `error` met while writing `path`, with a message that says what to do."""
    if is_disk_full(error):
        return OutputError(f"cannot write {path}: the disk is full; free some space or choose another place")
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(f"cannot write {path}: permission denied; choose a place you may write to")
    if number in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return OutputError(f"cannot write {path}: a file stands in a folder's place; choose another name")
    reason = getattr(error, "strerror", None) or error
    return OutputError(f"cannot write {path}: {reason}; choose another place")


def _resolve(path: PathLike) -> Path:
    if not os.fspath(path):
        raise OutputError("the output path is empty; give a file or folder name")
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise output_error(path, error) from error


def _beside(target: Path, suffix: str) -> Path:
    # A cut name keeps the part within the file system's limit when the target's own name is at it.
    return target.with_name(f".{target.name[:40]}.{os.getpid()}-{next(_serial)}.part{suffix}")


@contextmanager
def _made_parents(target: Path) -> Iterator[None]:
    made: list[Path] = []
    try:
        missing = list(itertools.takewhile(lambda folder: not folder.exists(), target.parents))
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            made.append(folder)
        yield
    except BaseException:
        for folder in reversed(made):
            with suppress(OSError):  # not empty: somebody else uses it by now
                folder.rmdir()
        raise


@contextmanager
def _output_errors(target: Path, part: Path) -> Iterator[None]:
    # The body may fail to read its inputs too; only what concerns this output is an output error.
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        if is_disk_full(error) or error.errno == errno.EROFS or _concerns(error, target, part):
            raise output_error(target, error) from error
        raise
    except Exception as error:
        if is_disk_full(error):
            raise output_error(target, error) from error
        raise


def _concerns(error: OSError, target: Path, part: Path) -> bool:
    named = [Path(os.fsdecode(n)) for n in (error.filename, error.filename2) if isinstance(n, (str, bytes))]
    return any(n in (target, part) or part in n.parents or n in target.parents for n in named)


def _flush_to_disk(part: Path) -> None:
    descriptor = os.open(part, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(part: Path, target: Path) -> None:
    if not target.exists():
        part.rename(target)
        return
    old = _beside(target, ".old")
    target.rename(old)
    try:
        part.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
