"""A bundle read and checked: manifest, tokenizer, preprocessing and the embedding table."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ppcr.config import PPCRConfig
from ppcr.errors import BundleError, CheckpointError
from ppcr.manifest import EMBEDDING, EMBEDDING_KEY, PREPROCESS, REBUILD, TOKENIZER, Manifest
from ppcr.prompts import Conversation
from ppcr.tokenizer import PromptTokenizer
from runtime.positions import Rotary, section_of

AUTO = "auto"
PRECISIONS = (AUTO, "fp32", "int8")
DEFAULT_BUNDLE = Path("bundles/ppcr-tiny-cpu")


@dataclass(frozen=True)
class Bundle:
    """A verified bundle at one precision.

    Attributes:
        folder: where it lies.
        precision: "fp32" or "int8", never "auto".
        graphs: file of each role ("vision", "decoder", "image_encoder", "mask_decoder").
        config: sizes and normalisation of both image inputs, and the conversation's measures.
        embedding: f32 [vocabulary, hidden], read-only: the MLLM's input embedding.
    """

    folder: Path
    manifest: Manifest
    precision: str
    graphs: dict[str, Path]
    config: PPCRConfig
    tokenizer: PromptTokenizer
    embedding: npt.NDArray[np.float32]

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
        tokenizer = PromptTokenizer.load(root / TOKENIZER, Conversation(config.mllm.ruler))
        embedding = _read_embedding(root / EMBEDDING, manifest)
        return cls(root, manifest, chosen, graphs, config, tokenizer, embedding)


def _read_config(path: Path) -> PPCRConfig:
    try:
        return PPCRConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, CheckpointError) as error:
        raise BundleError(f"cannot read {path}: {error}; {REBUILD}") from None


def _read_embedding(path: Path, manifest: Manifest) -> npt.NDArray[np.float32]:
    # Here, because the import costs more than reading the manifest of a bundle that turns out to be wrong.
    from safetensors.numpy import load_file

    try:
        table = np.ascontiguousarray(load_file(path)[EMBEDDING_KEY], np.float32)
    except Exception as error:  # safetensors raises its own type, OSError or KeyError
        raise BundleError(f"cannot read {path}: {error}; {REBUILD}") from None
    wanted = manifest.shapes.vocabulary, manifest.shapes.hidden
    if table.shape != wanted:
        raise BundleError(
            f"{path} holds a table of shape {table.shape}, the manifest says {wanted}; {REBUILD}"
        )
    table.flags.writeable = False
    return table
