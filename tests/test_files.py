"""Whole files or none: atomic writing, what is refused, and what each failure says."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from ppcr import files
from ppcr.errors import BundleError, OutputError
from ppcr.files import (
    atomic_directory,
    atomic_file,
    ensured_directory,
    sha256_directory,
    sha256_file,
    write_bytes,
    write_json,
    write_text,
)

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_sha256_of_a_file_larger_than_one_read(tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_sha256_of_a_directory_sees_names_and_contents_only(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, order in ((first, "ab"), (second, "ba")):
        (folder / "in").mkdir(parents=True)
        for name in order:
            (folder / "in" / name).write_text(f"content {name}")
    os.utime(second / "in" / "a", (0, 0))
    same = sha256_directory(first)
    assert sha256_directory(second) == same
    (second / "in" / "a").write_text("content A")
    assert sha256_directory(second) != same
    (second / "in" / "a").write_text("content a")
    (second / "in" / "a").rename(second / "in" / "c")
    assert sha256_directory(second) != same


def test_writers_make_parents_and_replace(tmp_path: Path) -> None:
    target = tmp_path / "x" / "y" / "data.json"
    write_json(target, {"b": 1, "word": "grün"})
    assert json.loads(target.read_text(encoding="utf-8")) == {"b": 1, "word": "grün"}
    write_text(target, "text")
    assert target.read_text() == "text"
    write_bytes(target, b"\x00")
    assert target.read_bytes() == b"\x00"
    assert names(tmp_path) == ["x", "x/y", "x/y/data.json"]


def test_new_files_have_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("x")
    write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == plain.stat().st_mode


def test_the_part_has_the_suffix_and_lies_beside(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "picture.png") as part:
        assert part.parent == tmp_path and part.suffix == ".png" and part.name.startswith(".")
        part.write_bytes(b"x")


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("n" * 251 + ".txt"), "x")
    assert len(names(tmp_path)) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x"), FULL], ids=["ctrl-c", "bug", "full"])
def test_a_failed_write_keeps_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "kept.txt"
    target.write_text("old")
    expected = OutputError if error is FULL else type(error)
    for path in (target, tmp_path / "made" / "here" / "new.txt"):
        with pytest.raises(expected), atomic_file(path) as part:
            part.write_text("half")
            raise error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["kept.txt"]


def test_a_full_disk_found_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise FULL

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OutputError, match="disk is full; free some space"):
        write_text(tmp_path / "a", "x")
    assert names(tmp_path) == []


def test_a_full_disk_told_by_a_library_in_words(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="disk is full"), atomic_directory(tmp_path / "d"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert names(tmp_path) == []


def test_an_input_that_is_missing_is_not_blamed_on_the_output(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "d"):
        (tmp_path / "absent").read_bytes()
    assert names(tmp_path) == []


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for call in (
        lambda: write_text(tmp_path / "file" / "a", "x"),
        lambda: ensured_directory(tmp_path / "file").__enter__(),
        lambda: ensured_directory(tmp_path / "file" / "sub").__enter__(),
        lambda: atomic_directory(tmp_path / "file").__enter__(),
        lambda: atomic_directory(tmp_path / "file" / "sub").__enter__(),
    ):
        with pytest.raises(OutputError, match="cannot write"):
            call()
    assert names(tmp_path) == ["file"]


def test_what_is_not_a_regular_file_is_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not a regular file"):
        write_text(os.devnull, "x")
    assert not Path(os.devnull).is_file()
    with pytest.raises(OutputError, match="is a folder"):
        write_text(tmp_path, "x")
    with pytest.raises(OutputError, match="empty"):
        write_text("", "x")
    with pytest.raises(OutputError, match="cannot write"):
        write_text("a\0b", "x")


def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user (root?) may write anywhere")
    for call in (
        lambda: write_text(locked / "a", "x"),
        lambda: ensured_directory(locked / "sub").__enter__(),
        lambda: ensured_directory(locked).__enter__(),
        lambda: atomic_directory(locked / "sub").__enter__(),
    ):
        with pytest.raises(OutputError, match="permission denied"):
            call()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_permission_denied_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def denied(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    for call in (
        lambda: write_text(tmp_path / "sub" / "a", "x"),
        lambda: ensured_directory(tmp_path / "sub").__enter__(),
        lambda: atomic_directory(tmp_path / "sub").__enter__(),
    ):
        with pytest.raises(OutputError, match="permission denied; choose a place"):
            call()


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real.txt")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_an_ensured_directory_holds_no_probe(tmp_path: Path) -> None:
    for _ in range(2):
        with ensured_directory(tmp_path / "a" / "b") as made:
            assert made == tmp_path / "a" / "b"
            assert names(tmp_path) == ["a", "a/b"]
    assert names(tmp_path) == ["a", "a/b"]


def test_an_ensured_directory_goes_with_its_parents_when_nothing_came_to_lie_in_it(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(KeyError), ensured_directory(tmp_path / "old" / "a" / "b"):
        raise KeyError
    assert names(tmp_path) == ["old"]
    with pytest.raises(KeyError), ensured_directory(tmp_path / "old" / "a" / "b") as made:
        (made.parent / "kept.txt").write_text("")
        raise KeyError
    assert names(tmp_path) == ["old", "old/a", "old/a/kept.txt"]


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "out" / "bundle"
    with atomic_directory(target) as part:
        (part / "manifest.json").write_text("1")
        assert not target.exists()
    assert names(tmp_path) == ["out", "out/bundle", "out/bundle/manifest.json"]


def test_a_directory_with_the_marker_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for version in ("one", "two"):
        with atomic_directory(target, marker="manifest.json") as part:
            (part / "manifest.json").write_text(version)
            (part / version).touch()
    assert names(target) == ["manifest.json", "two"]
    assert names(tmp_path) == ["bundle", "bundle/manifest.json", "bundle/two"]


def test_somebody_elses_directory_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    for marker in (None, "manifest.json"):
        with pytest.raises(OutputError, match="will not replace"), atomic_directory(home, marker=marker):
            pytest.fail("the body must not run")
    assert names(tmp_path) == ["home", "home/thesis.txt"]


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic_directory(tmp_path / "empty") as part:
        (part / "a").touch()
    assert names(tmp_path) == ["empty", "empty/a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), FULL], ids=["ctrl-c", "full"])
def test_a_failed_build_keeps_the_old_directory(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "bundle"
    with atomic_directory(target, marker="m") as part:
        (part / "m").write_text("old")
    with (
        pytest.raises(OutputError if error is FULL else KeyboardInterrupt),
        atomic_directory(target, marker="m") as part,
    ):
        (part / "m").write_text("new")
        raise error
    assert (target / "m").read_text() == "old"
    assert names(tmp_path) == ["bundle", "bundle/m"]


def test_ctrl_c_between_the_two_renames_puts_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "bundle"
    with atomic_directory(target, marker="m") as part:
        (part / "m").write_text("old")
    rename = Path.rename

    def stopped(self: Path, to: Path) -> Path:
        if self.name.endswith(".part"):
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(files.Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), atomic_directory(target, marker="m") as part:
        (part / "m").write_text("new")
    assert (target / "m").read_text() == "old"
    assert names(tmp_path) == ["bundle", "bundle/m"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "a.json is missing"),
        ("{", "cannot read"),
        ("\udcff", "cannot read"),
        ("[" * 100_000, "cannot read"),
        ("[]", "not a JSON object"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=told):
        files.read_json(path, BundleError)
    if content is None:
        with pytest.raises(BundleError, match="^give another$"):
            files.read_json(path, BundleError, missing="give another")


def test_a_json_object_is_read_as_it_was_written(tmp_path: Path) -> None:
    value = {"name": "\u00e9", "sizes": [1, 2.5, None]}
    write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json", BundleError) == value
