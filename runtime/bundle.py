"""A bundle read and checked: manifest, tokenizer, preprocessing and the embedding table."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ppcr.config import PPCRConfig
from ppcr.drafts import Glossary
from ppcr.errors import BundleError, CheckpointError
from ppcr.manifest import DRAFTS, EMBEDDING, EMBEDDING_KEY, PREPROCESS, REBUILD, TOKENIZER, Manifest
from ppcr.tensors import RowTable, TensorFiles
from ppcr.tokenizer import PromptTokenizer
from ppcr.zero_shot import tokenizer_of
from runtime.positions import Rotary, section_of

AUTO = "auto"
PRECISIONS = (AUTO, "fp32", "fp16", "bf16", "int8", "int4")
DEFAULT_BUNDLE = Path("bundles/ppcr-tiny-cpu")
_LARGE = 64 << 20

_Table = TypeVar("_Table", npt.NDArray[np.float32], RowTable)


@dataclass(frozen=True)
class Bundle:
    """A verified bundle at one precision.

    Attributes:
        folder: where it lies.
        precision: one of `PRECISIONS`, never "auto".
        graphs: file of each role ("vision", "decoder", "image_encoder", "mask_decoder", and further ones).
        config: sizes and normalisation of both image inputs, and the conversation's measures.
        embedding: f32 [vocabulary, hidden], read-only: the MLLM's input embedding. A large one stays in its
            file, of which rows are read when they are asked for.
        glossary: what stage 1's answers are guessed with; None where the checkpoint has none.
    """

    folder: Path
    manifest: Manifest
    precision: str
    graphs: dict[str, Path]
    config: PPCRConfig
    tokenizer: PromptTokenizer
    embedding: npt.NDArray[np.float32] | RowTable
    glossary: Glossary | None = None

    @property
    def rotary(self) -> Rotary:
        shapes = self.manifest.shapes
        section = section_of(shapes.mrope_section, shapes.head_dim)
        return Rotary(shapes.head_dim, shapes.rope_theta, section, shapes.mrope_interleaved)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, precision: str = AUTO, target: str = "cpu") -> Bundle:
        """Read a bundle, checking every file's presence and size, and the hashes of those in use.

        ``precision`` "auto" takes the one that the build found fit to be the default.

        Raises:
            BundleError: missing, of another version or target, lacking the precision, or with a missing,
                changed or foreign file; the message says what to do.
        """
        root = Path(folder)
        manifest = Manifest.load(root, target=target)
        chosen = manifest.default_precision if precision == AUTO else precision
        graphs = {role: root / name for role, name in manifest.paths(chosen).items()}
        manifest.verify(root, chosen)
        config = _read_config(root / PREPROCESS)
        tokenizer = tokenizer_of(config, root / TOKENIZER)
        embedding = _read_embedding(root / EMBEDDING, manifest)
        glossary = Glossary.load(root / DRAFTS) if DRAFTS in manifest.files else None
        return cls(root, manifest, chosen, graphs, config, tokenizer, embedding, glossary)


def _read_config(path: Path) -> PPCRConfig:
    try:
        return PPCRConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, CheckpointError) as error:
        raise BundleError(f"cannot read {path}: {error}; {REBUILD}") from None


def _read_embedding(path: Path, manifest: Manifest) -> npt.NDArray[np.float32] | RowTable:
    wanted = manifest.shapes.vocabulary, manifest.shapes.hidden
    if path.stat().st_size > _LARGE:
        try:
            large = RowTable(TensorFiles(path.parent, [path.name]), EMBEDDING_KEY)
        except (CheckpointError, KeyError) as error:
            raise BundleError(f"cannot read {path}: {error}; {REBUILD}") from None
        return _sized(large, path, wanted)
    try:
        table = np.ascontiguousarray(TensorFiles(path.parent, [path.name])[EMBEDDING_KEY], np.float32)
    except (CheckpointError, OSError, KeyError) as error:
        raise BundleError(f"cannot read {path}: {error}; {REBUILD}") from None
    table.flags.writeable = False
    return _sized(table, path, wanted)


def _sized(table: _Table, path: Path, wanted: tuple[int, int]) -> _Table:
    if table.shape != wanted:
        raise BundleError(
            f"{path} holds a table of shape {table.shape}, the manifest says {wanted}; {REBUILD}"
        )
    return table
