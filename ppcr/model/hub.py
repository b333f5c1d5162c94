"""A model's folder by its path, or by its name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from ppcr.errors import CheckpointError, is_disk_full

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights in other formats, which many repositories hold beside these, are never read.
_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")


def locate(name: str) -> Path:
    """The file or folder ``name``, or else the snapshot of the hub's repository of that name.

    Raises:
        CheckpointError: there is no such path, and it cannot be downloaded either.
    """
    path = Path(name)
    if path.exists():
        return path
    if not _HUB_NAME.fullmatch(name):
        raise CheckpointError(f"{name} does not exist: give a path, or a name on the hub (owner/model)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # several libraries' own: no network, no such name, no permission
        if is_disk_full(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name} is no path here and cannot be downloaded ({reason.rstrip('.')}): "
            "check the name and the network, or download it elsewhere and give its folder"
        ) from None
