"""A bundle around a public MLLM: weights stream from its files into each format, once for all image sizes.

The segmenter's graphs are those of every bundle (`export.bundle`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from export import precision as precisions
from export.bundle import GRAPHS, BundleWriter, Progress
from export.decoder_graph import DecoderSizes, write_decoder
from export.external import ExternalData
from export.formats import FORMATS
from export.segmenter_graph import write_image_encoder, write_mask_decoder
from export.vision_graph import VisionSizes, write_vision
from ppcr.boxes import WRITTEN
from ppcr.checkpoint import Checkpoint
from ppcr.manifest import DATA, EMBEDDING_KEY, WEIGHTS, Shapes, vision_role
from ppcr.tensors import TensorFiles

_SEGMENTER = ("image_encoder", "mask_decoder")
_PIECE = 64 << 20


@dataclass
class PretrainedBundleWriter(BundleWriter):
    """Writes the files of one bundle into an empty directory; as `BundleWriter`."""

    _written: set[str] = field(default_factory=set)

    def steps(self, wanted: Sequence[str]) -> int:
        towers = len({FORMATS[p].vision for p in wanted}) * len(self.checkpoint.config.mllm.sizes)
        return towers + len(wanted) + 2 * (1 + any(FORMATS[p].segmenter != "fp32" for p in wanted))

    def roles(self, precision: str) -> dict[str, str]:
        """File of each role at ``precision``."""
        form = FORMATS[precision]
        decoder = precisions.file_name(GRAPHS["decoder"], precision)
        tower = precisions.file_name(GRAPHS["vision"], form.vision)
        further = self.checkpoint.config.mllm.sizes[1:]
        segmenter = {role: precisions.file_name(GRAPHS[role], form.segmenter) for role in _SEGMENTER}
        return {
            "vision": tower,
            **{vision_role(size): _of_size(tower, size) for size in further},
            f"vision{WEIGHTS}": tower + DATA,
            "decoder": decoder,
            f"decoder{WEIGHTS}": decoder + DATA,
            **self._with_weights(segmenter),
        }

    def write_graphs(self, wanted: Sequence[str]) -> Shapes:
        """Write every graph in each format of ``wanted``; returns the shapes they have."""
        for name in GRAPHS.values():
            (self.root / name).parent.mkdir(exist_ok=True)
        config = self.checkpoint.mllm_config
        vision = VisionSizes.from_config(config, self.checkpoint.config.mllm.image_size)
        self._require_agreement(vision, DecoderSizes.from_config(config))
        for precision in wanted:
            self._write_towers(precision)
            decoder = self._write_decoder(precision)
        self._write_segmenter({FORMATS[precision].segmenter for precision in wanted})
        return self._shapes(vision, decoder)

    def _write_towers(self, precision: str) -> None:
        form, roles = FORMATS[precision], self.roles(precision)
        if roles["vision"] in self._written:
            return
        self._written.add(roles["vision"])
        first, *further = self.checkpoint.config.mllm.sizes
        names = {first: roles["vision"], **{size: roles[vision_role(size)] for size in further}}
        with ExternalData(self.root / roles[f"vision{WEIGHTS}"]) as data:
            for size, name in names.items():
                with self._step(name):
                    write_vision(
                        self.checkpoint.mllm_config,
                        self.checkpoint.mllm_tensors,
                        self.root / name,
                        image_size=size,
                        dtype=form.dtype,
                        bits=form.vision_bits,
                        data=data,
                    )

    def _write_decoder(self, precision: str) -> DecoderSizes:
        form, name = FORMATS[precision], self.roles(precision)["decoder"]
        with self._step(name):
            return write_decoder(
                self.checkpoint.mllm_config,
                self.checkpoint.mllm_tensors,
                self.root / name,
                dtype=form.dtype,
                bits=form.decoder_bits,
                external=True,
            )

    def _write_segmenter(self, formats: set[str]) -> None:
        for role, write in zip(_SEGMENTER, (write_image_encoder, write_mask_decoder), strict=True):
            plain = self.root / GRAPHS[role]
            with self._step(GRAPHS[role]):
                write(self.segmenter, plain)
            if "int8" in formats:
                target = precisions.file_name(GRAPHS[role], "int8")
                with self._step(target):
                    precisions.quantise(role, plain, self.root / target)
            if "fp32" not in formats:
                plain.unlink()
                plain.with_name(plain.name + DATA).unlink(missing_ok=True)

    def _write_embedding(self, path: Path) -> None:
        copy_tensor(self.checkpoint.mllm_tensors, self.checkpoint.embedding_name, path, EMBEDDING_KEY)


def _beside(graph: Path) -> Path:
    return graph.with_name(graph.name + DATA)


def _of_size(name: str, size: tuple[int, int]) -> str:
    stem, dot, rest = name.partition(".")
    return f"{stem}.{size[0]}x{size[1]}{dot}{rest}"


def copy_tensor(tensors: TensorFiles, name: str, path: Path, key: str) -> None:
    """Write a tensor as the only one, called ``key``, of the safetensors file ``path``, piece by piece."""
    raw = tensors.raw(name).reshape(-1).view(np.uint8)
    entry = {"dtype": tensors.kind(name), "shape": list(tensors.shape(name)), "data_offsets": [0, len(raw)]}
    header = json.dumps({key: entry}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for piece in range(math.ceil(len(raw) / _PIECE)):
            file.write(np.ascontiguousarray(raw[piece * _PIECE : (piece + 1) * _PIECE]).data)


def bundle_writer(checkpoint: Checkpoint, root: Path, progress: Progress) -> BundleWriter:
    """The writer for a checkpoint: its MLLM is a public one, or one trained here."""
    kind = PretrainedBundleWriter if checkpoint.config.box_convention in WRITTEN else BundleWriter
    return kind(checkpoint, root, progress)
