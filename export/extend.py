"""A bundle that gets more files: what it has is linked into a new folder, which then takes its place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ppcr.manifest import MANIFEST, FileEntry, files_below


def link_files(bundle: Path, part: Path) -> None:
    """Every file of ``bundle`` in the folder ``part``, without a copy where the file system has links."""
    for name in files_below(bundle):
        place = part / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(bundle / name, place)
        except OSError:
            shutil.copyfile(bundle / name, place)


def held_files(part: Path) -> dict[str, FileEntry]:
    """The manifest's entry of every file in ``part`` but the manifest itself."""
    return {name: FileEntry.of(part / name) for name in files_below(part) if name != MANIFEST}
