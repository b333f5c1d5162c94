"""A checkpoint directory: where its parts lie, whether they are all there, and its hash.

::

    config.json     PPCRConfig
    mllm/           a plain Hugging Face directory with tokenizer.json
    segmenter/      config.json + model.safetensors
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ppcr.config import PPCRConfig
from ppcr.errors import CheckpointError
from ppcr.files import read_json, sha256_directory
from ppcr.tensors import TensorFiles

SHIPPED = Path(__file__).resolve().parent / "assets" / "ppcr-tiny"
"""The trained checkpoint that comes with the package."""

_PARTS = ("mllm/config.json", "mllm/tokenizer.json", "segmenter/config.json")
_EMBEDDING = ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that holds every part. Make one with `Checkpoint.open`.

    Attributes:
        root: the directory.
        config: its config.json.
    """

    root: Path
    config: PPCRConfig

    @classmethod
    def open(cls, root: Path | None = None) -> Checkpoint:
        """Check the layout of ``root`` (default: the shipped checkpoint) and the headers of its weights.

        Raises:
            CheckpointError: names what is missing, damaged or of another version.
        """
        root = SHIPPED if root is None else root
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise CheckpointError(f"{root} {what}: give a directory with config.json, mllm/ and segmenter/")
        checkpoint = cls(root, PPCRConfig.load(root))
        for part in _PARTS:
            if not (root / part).is_file():
                raise CheckpointError(f"{root} lacks {part}: copy the whole checkpoint, or train it again")
        for tensors in (checkpoint.mllm_tensors, checkpoint.segmenter_tensors):
            if not tensors:
                raise CheckpointError(f"{tensors.folder} holds no weights: copy the whole checkpoint")
        family = checkpoint.mllm_config.get("model_type")
        if family != checkpoint.config.mllm.family:
            raise CheckpointError(
                f"{root}: config.json speaks of {checkpoint.config.mllm.family!r}, mllm/ holds {family!r}"
            )
        return checkpoint

    @property
    def mllm(self) -> Path:
        """The folder of the MLLM."""
        return self.root / "mllm"

    @property
    def segmenter(self) -> Path:
        """The folder of the segmenter."""
        return self.root / "segmenter"

    @property
    def tokenizer(self) -> Path:
        """The file of the MLLM's tokenizer."""
        return self.root / "mllm" / "tokenizer.json"

    @cached_property
    def mllm_config(self) -> dict[str, Any]:
        """mllm/config.json as a dictionary."""
        return read_json(self.mllm / "config.json", CheckpointError)

    @cached_property
    def mllm_tensors(self) -> TensorFiles:
        """The MLLM's weights, read when asked for."""
        return TensorFiles(self.mllm)

    @cached_property
    def segmenter_tensors(self) -> TensorFiles:
        """The segmenter's weights, read when asked for."""
        return TensorFiles(self.segmenter)

    def embedding(self) -> np.ndarray:
        """The MLLM's input embedding, f32 [vocabulary, hidden]. Raises CheckpointError when there is none."""
        return np.ascontiguousarray(self.mllm_tensors[self.embedding_name], np.float32)

    @property
    def embedding_name(self) -> str:
        """What mllm/ calls its input embedding. Raises CheckpointError when there is none."""
        return self.mllm_tensors.name_of(*_EMBEDDING)

    def source_hash(self) -> str:
        """SHA-256 over the names and contents of all files: what a bundle records as its source."""
        try:
            return sha256_directory(self.root)
        except OSError as error:
            raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from None
