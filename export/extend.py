"""A bundle that gets more files: what it has is linked into a new folder, which then takes its place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from ppcr.manifest import MANIFEST, FileEntry, Manifest, files_below


def link_files(bundle: Path, part: Path) -> None:
    """Every file of ``bundle`` in the folder ``part``, without a copy where the file system has links."""
    for name in files_below(bundle):
        place = part / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(bundle / name, place)
        except OSError:
            shutil.copyfile(bundle / name, place)


def held_files(part: Path, manifest: Manifest, written: Collection[str]) -> dict[str, FileEntry]:
    """The entry of every file in ``part``: new for those ``written``, else as ``manifest`` has it.

    Files that were only linked keep their entry: one that had changed before is still found out afterwards.
    """
    names = [name for name in files_below(part) if name != MANIFEST]
    fresh = {name for name in names if name in written or name not in manifest.files}
    return {name: FileEntry.of(part / name) if name in fresh else manifest.files[name] for name in names}
