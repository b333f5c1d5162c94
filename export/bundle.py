"""What goes into a bundle, step by step: graphs, table, tokenizer, preprocessing, manifest."""

from __future__ import annotations

import hashlib
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from export import precision as precisions
from export.decoder_graph import OPSET, DecoderSizes, write_decoder
from export.segmenter_graph import write_image_encoder, write_mask_decoder
from export.vision_graph import VisionSizes, write_vision
from ppcr.checkpoint import Checkpoint
from ppcr.errors import CheckpointError
from ppcr.files import sha256_file, write_json
from ppcr.manifest import (
    DATA,
    DRAFTS,
    EMBEDDING,
    EMBEDDING_KEY,
    MANIFEST,
    PREPROCESS,
    TOKENIZER,
    WEIGHTS,
    FileEntry,
    Manifest,
    Parity,
    Shapes,
    files_below,
)
from ppcr.model.segmenters import AnySegmenter, load_segmenter

TARGET = "cpu"
GRAPHS = {
    "vision": "mllm/vision.onnx",
    "decoder": "mllm/decoder.onnx",
    "image_encoder": "segmenter/image_encoder.onnx",
    "mask_decoder": "segmenter/mask_decoder.onnx",
}
_TOOLS = ("onnx", "onnxruntime", "onnxscript", "torch", "transformers", "numpy")

Progress = Callable[[str], None]


@dataclass
class BundleWriter:
    """Writes the files of one bundle into an empty directory.

    Attributes:
        checkpoint: what is exported. root: where to. progress: called before each step with its name.
        seconds: time of each graph, by relative path.
    """

    checkpoint: Checkpoint
    root: Path
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    def steps(self, wanted: Sequence[str]) -> int:
        """How often ``progress`` is called for the graphs of ``wanted``."""
        return len(GRAPHS) * (1 + sum(precision != "fp32" for precision in wanted))

    def roles(self, precision: str) -> dict[str, str]:
        """File of each role at ``precision``, once the graphs are written."""
        graphs = {role: precisions.file_name(name, precision) for role, name in GRAPHS.items()}
        return self._with_weights(graphs)

    def _with_weights(self, graphs: dict[str, str]) -> dict[str, str]:
        """``graphs`` and the files of weights that lie beside them: a large segmenter's."""
        beside = {f"{role}{WEIGHTS}": name + DATA for role, name in graphs.items()}
        return {**graphs, **{role: name for role, name in beside.items() if (self.root / name).is_file()}}

    @cached_property
    def segmenter(self) -> AnySegmenter:
        try:
            return load_segmenter(self.checkpoint.segmenter)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"cannot read {self.checkpoint.segmenter}: {error}") from None

    def write_graphs(self, wanted: Sequence[str]) -> Shapes:
        """Write every graph at each precision of ``wanted``; returns the shapes they have."""
        shapes = self._write_fp32()
        for precision in wanted:
            if precision != "fp32":
                for role, name in GRAPHS.items():
                    target = precisions.file_name(name, precision)
                    with self._step(target):
                        precisions.quantise(role, self.root / name, self.root / target)
        if "fp32" not in wanted:
            for name in GRAPHS.values():
                (self.root / name).unlink()
                (self.root / f"{name}{DATA}").unlink(missing_ok=True)
        return shapes

    def write_common(self) -> None:
        """Embedding table, tokenizer, preprocessing, and the glossary of drafts if there is one."""
        self._write_embedding(self.root / EMBEDDING)
        shutil.copyfile(self.checkpoint.tokenizer, self.root / TOKENIZER)
        if (drafts := self.checkpoint.root / DRAFTS).is_file():
            shutil.copyfile(drafts, self.root / DRAFTS)
        write_json(self.root / PREPROCESS, self.checkpoint.config.to_dict())

    def manifest(
        self,
        wanted: Sequence[str],
        shapes: Shapes,
        *,
        parity: dict[str, Parity] | None = None,
        allowed: bool = False,
    ) -> Manifest:
        """The manifest of what lies in ``root`` now."""
        return Manifest(
            name=self.checkpoint.config.name,
            source=self.checkpoint.source_hash(),
            target=TARGET,
            opset=OPSET,
            tools=tools(),
            box_convention=self.checkpoint.config.box_convention,
            precisions={precision: self.roles(precision) for precision in wanted},
            files={n: FileEntry.of(self.root / n) for n in files_below(self.root) if n != MANIFEST},
            shapes=shapes,
            default_precision=wanted[0],
            parity=parity or {},
            parity_failure_allowed=allowed,
        )

    def _write_embedding(self, path: Path) -> None:
        from safetensors.numpy import save_file

        save_file({EMBEDDING_KEY: self.checkpoint.embedding()}, path)

    def _write_fp32(self) -> Shapes:
        checkpoint, config = self.checkpoint, self.checkpoint.config
        for folder in {(self.root / name).parent for name in GRAPHS.values()}:
            folder.mkdir()
        paths = {role: self.root / name for role, name in GRAPHS.items()}
        source = checkpoint.mllm_config, checkpoint.mllm_tensors
        with self._step(GRAPHS["vision"]):
            vision = write_vision(*source, paths["vision"], image_size=config.mllm.image_size)
        with self._step(GRAPHS["decoder"]):
            decoder = write_decoder(*source, paths["decoder"])
        self._require_agreement(vision, decoder)
        with self._step(GRAPHS["image_encoder"]):
            write_image_encoder(self.segmenter, paths["image_encoder"])
        with self._step(GRAPHS["mask_decoder"]):
            write_mask_decoder(self.segmenter, paths["mask_decoder"])
        return self._shapes(vision, decoder)

    def _require_agreement(self, vision: VisionSizes, decoder: DecoderSizes) -> None:
        config, segmenter = self.checkpoint.config, self.segmenter.config
        said = (config.mllm.patch, config.mllm.merge, config.mllm.temporal, config.segmenter.image_size)
        side = segmenter.image_size
        if said != (vision.patch, vision.merge, vision.temporal, (side, side)):
            raise CheckpointError("config.json of the checkpoint gives other sizes than its models have")
        if not vision.out == decoder.hidden == segmenter.text_dim:
            widths = f"{vision.out}, {decoder.hidden} and {segmenter.text_dim}"
            raise CheckpointError(
                f"vision tower, decoder and segmenter are of different widths ({widths}): "
                "they were not made for each other"
            )

    def _shapes(self, vision: VisionSizes, decoder: DecoderSizes) -> Shapes:
        config, segmenter = self.checkpoint.config, self.segmenter.config
        return Shapes(
            max_length=config.mllm.max_length,
            image_tokens=vision.tokens,
            grid=config.mllm.grid,
            patches=vision.patches,
            patch_dim=vision.patch_dim,
            layers=decoder.layers,
            kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            hidden=decoder.hidden,
            vocabulary=decoder.vocabulary,
            rope_theta=decoder.rope_theta,
            mrope_section=decoder.mrope_section,
            mrope_interleaved=decoder.mrope_interleaved,
            deepstack=decoder.deepstack,
            image_size=config.segmenter.image_size,
            mask_size=(segmenter.mask_size, segmenter.mask_size),
            max_text=segmenter.max_text,
        )

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        self.progress(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def tools() -> dict[str, str]:
    """Versions of what a bundle was made with, and a hash of the sources that shape its graphs."""
    found = {name: version(name) for name in _TOOLS}
    return {"python": platform.python_version(), **found, "sources": _sources()}


def _sources() -> str:
    digest = hashlib.sha256()
    here = Path(__file__).resolve().parent
    for folder in (here, here.parent / "ppcr" / "model"):
        for path in sorted(folder.glob("*.py")):
            digest.update(f"{sha256_file(path)}  {path.name}\n".encode())
    return digest.hexdigest()[:16]
