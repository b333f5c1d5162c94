"""manifest.json of a bundle: what is in it, where it came from, and how well it agrees with the reference.

Needs the standard library alone, so that the runtime can check a bundle before any engine is loaded.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ppcr import __version__
from ppcr.errors import BundleError
from ppcr.files import read_json, sha256_file, write_json
from ppcr.kinds import read_fields, require_kinds

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
PREPROCESS = "preprocess.json"
DRAFTS = "drafts.json"
"""What answers are guessed with (`ppcr.drafts`); a bundle may lack it."""
EMBEDDING = "mllm/embed.safetensors"
EMBEDDING_KEY = "weight"
"""The one tensor of ``mllm/embed.safetensors``, [vocabulary, hidden], in the type the checkpoint has it."""
COMMON = (TOKENIZER, PREPROCESS, EMBEDDING)
ROLES = ("vision", "decoder", "image_encoder", "mask_decoder")
"""The graphs of every bundle. Further ones are named by `vision_role`, files of weights end in `WEIGHTS`."""
ENGINES = "python export/build_engines.py"
WEIGHTS = "_weights"
DATA = ".data"
"""What the name of a graph's file of weights ends in, after the graph's own name."""
REBUILD = "build it again with: python export/build_engines.py --force"


@dataclass(frozen=True)
class FileEntry:
    """Hex SHA-256 and size of one file of the bundle."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        return cls(sha256_file(path), path.stat().st_size)


@dataclass(frozen=True)
class Shapes:
    """What a host needs to know to feed the graphs.

    Attributes:
        max_length: static length of the KV cache, in tokens.
        image_tokens: tokens an image takes, in row order of ``grid`` = (rows, columns).
        patches, patch_dim: rows and columns of the vision tower's input.
        layers, kv_heads, head_dim: KV caches are f32[1, kv_heads, max_length, head_dim], two a layer.
        hidden, vocabulary: of the embedding table and the logits.
        rope_theta, mrope_section, mrope_interleaved: multimodal rotary positions (time, row, column).
        deepstack: inputs ``deepstack_i`` of the decoder (0 for Qwen2.5-VL).
        image_size, mask_size: (height, width) of the segmenter's input and of its mask logits.
        max_text: longest semantic prompt the segmenter reads, in tokens.
    """

    max_length: int
    image_tokens: int
    grid: tuple[int, int]
    patches: int
    patch_dim: int
    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    rope_theta: float
    mrope_section: tuple[int, ...]
    image_size: tuple[int, int]
    mask_size: tuple[int, int]
    max_text: int
    mrope_interleaved: bool = False
    deepstack: int = 0


@dataclass(frozen=True)
class Parity:
    """Engine against the torch reference on held-out scenes.

    Attributes:
        scenes: how many.
        identical_tokens: share of scenes whose tokens of both stages are all the same, 0..1.
        mean_iou, worst_iou: of the union masks, engine against reference, 0..1.
        passed: whether the thresholds of this precision were met.
    """

    scenes: int
    identical_tokens: float
    mean_iou: float
    worst_iou: float
    passed: bool


@dataclass(frozen=True)
class EngineEntry:
    """An engine compiled from one of the bundle's graphs.

    Attributes:
        role: of `Manifest.engine_roles`. target: the GPU ("sm_89").
        precision: what it computes in ("fp16", "int4", …).
        file, onnx: the engine, and the graph it was compiled from, as named in the manifest's ``files``.
        onnx_sha256: of that graph then.
        flavour, version: of the library that compiled it ("tensorrt", "tensorrt_rtx").
        options: how ("weight-streaming", …). bytes_on_gpu: activations and weights.
    """

    role: str
    target: str
    precision: str
    file: str
    onnx: str
    onnx_sha256: str
    flavour: str
    version: str
    options: tuple[str, ...] = ()
    bytes_on_gpu: int = 0


@dataclass(frozen=True)
class Manifest:
    """A bundle's contents. Paths are relative to the bundle, with forward slashes.

    Attributes:
        name: of the checkpoint ("ppcr-tiny").
        source: SHA-256 over the checkpoint's files.
        target: what the graphs were made for ("cpu").
        precisions: per precision ("fp32", "int8", …), the file of each role in ROLES, of the vision graphs
            for further image sizes, and of weights that lie beside their graphs.
        files: every file of the bundle but the manifest itself.
        default_precision: what a load takes when nothing is said.
        parity: figures by `parity_key`: those of onnxruntime, which the build measures, and of other engines;
            empty when the gate was not run.
        parity_failure_allowed: the bundle was shipped with --allow-parity-failure.
        engines: what was compiled from the graphs so far, if anything.
    """

    name: str
    source: str
    target: str
    opset: int
    tools: dict[str, str]
    box_convention: str
    precisions: dict[str, dict[str, str]]
    files: dict[str, FileEntry]
    shapes: Shapes
    default_precision: str
    parity: dict[str, Parity] = field(default_factory=dict)
    parity_failure_allowed: bool = False
    engines: tuple[EngineEntry, ...] = ()
    ppcr: str = __version__
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Manifest:
        """Read what ``to_dict`` wrote.

        Raises:
            BundleError: of another format or version, or fields are missing, unknown or of another kind.
        """
        if data.get("format") != FORMAT:
            raise BundleError(
                f"this bundle has format {data.get('format')!r}, ppcr {__version__} reads {FORMAT}: {REBUILD}"
            )
        if _series(data.get("ppcr")) != _series(__version__):
            raise BundleError(
                f"this bundle was built by ppcr {data.get('ppcr')!r}, this is ppcr {__version__}: {REBUILD}"
            )
        try:
            manifest = cls(
                **{
                    **data,
                    "files": {str(k): read_fields(FileEntry, v) for k, v in data["files"].items()},
                    "shapes": read_fields(Shapes, data["shapes"]),
                    "parity": {str(k): read_fields(Parity, v) for k, v in data["parity"].items()},
                    "engines": tuple(read_fields(EngineEntry, v) for v in data.get("engines", ())),
                }
            )
            require_kinds(manifest)._require_complete()
        except (TypeError, KeyError, AttributeError) as error:
            raise BundleError(f"{MANIFEST} does not fit this version of ppcr ({error}): {REBUILD}") from None
        return manifest

    @classmethod
    def load(cls, bundle: Path, *, target: str = "cpu") -> Manifest:
        """Read ``bundle/manifest.json``; files are checked by `verify`.

        Raises:
            BundleError: missing, unreadable, of another version or for another target.
        """
        path = bundle / MANIFEST
        missing = f"{bundle} is not a bundle (it has no {MANIFEST}): make one: {ENGINES}"
        manifest = cls.from_dict(read_json(path, BundleError, missing=missing, cure=REBUILD))
        if manifest.target != target:
            raise BundleError(f"this bundle was built for {manifest.target!r}, not for {target!r}: {REBUILD}")
        return manifest

    def save(self, bundle: Path) -> None:
        """Write ``bundle/manifest.json`` atomically."""
        write_json(bundle / MANIFEST, self.to_dict())

    def paths(self, precision: str | None = None) -> dict[str, str]:
        """File of each role at ``precision`` (default: ``default_precision``).

        Raises:
            BundleError: the bundle does not hold that precision.
        """
        wanted = precision or self.default_precision
        if wanted not in self.precisions:
            held = ", ".join(self.precisions)
            raise BundleError(f"this bundle holds {held}, not {wanted!r}: choose one of these")
        return self.precisions[wanted]

    @property
    def engine_roles(self) -> tuple[str, ...]:
        """Roles that a set of engines has: ROLES, and the vision towers for further image sizes."""
        return (*ROLES, *(role for role in self.paths() if _is_tower(role)))

    def engine_set(self, target: str, precision: str | None = None) -> dict[str, EngineEntry]:
        """The engine of each role for ``target`` at ``precision`` (default: the one built last).

        Raises:
            BundleError: there are none, or not for every role; says the command that builds them.
        """
        fitting = [entry for entry in self.engines if entry.target == target]
        wanted = precision or (fitting[-1].precision if fitting else None)
        found = {entry.role: entry for entry in fitting if entry.precision == wanted}
        if set(found) == set(self.engine_roles):
            return found
        held = ", ".join(dict.fromkeys(f"{entry.target} {entry.precision}" for entry in self.engines))
        at = f" --precision {precision}" if precision else ""
        raise BundleError(
            f"this bundle has no engines for {target}{f' at {precision}' if precision else ''} "
            f"(it has {held or 'none'}): build them with: {ENGINES} --target {target}{at}"
        )

    def verify(self, bundle: Path, precision: str | None = None) -> None:
        """Compare the directory with ``files``: nothing missing, changed or foreign.

        Every file is checked for presence and size; those that ``precision`` reads (None: all) by hash too,
        the weights beside its graphs included.

        Raises:
            BundleError: names the first file that does not fit.
        """
        read = self.files if precision is None else (*COMMON, DRAFTS, *self.paths(precision).values())
        # Weights beside a graph, whether or not they have a role of their own.
        hashed = {*read, *(name + DATA for name in read)}
        for name, entry in self.files.items():
            path = bundle / name
            try:
                size = path.stat().st_size if path.is_file() else None
                changed = size != entry.bytes or (name in hashed and sha256_file(path) != entry.sha256)
            except OSError as error:
                raise BundleError(f"cannot read {path}: {error.strerror or error}") from None
            if size is None:
                raise BundleError(f"{bundle} lacks {name}: {REBUILD}")
            if changed:
                raise BundleError(f"{path} is not the file this bundle was built with: {REBUILD}")
        foreign = sorted(set(files_below(bundle)) - set(self.files) - {MANIFEST})
        if foreign:
            raise BundleError(f"{bundle / foreign[0]} does not belong to this bundle: remove it or {REBUILD}")

    def _require_complete(self) -> None:
        names = [name for roles in self.precisions.values() for name in roles.values()]
        names += [name for entry in self.engines for name in (entry.file, entry.onnx)]
        for name in (*COMMON, *names, *self.files):
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts or name not in self.files:
                raise KeyError(name)
        for precision, roles in self.precisions.items():
            further = [role for role in roles if role not in ROLES]
            if not set(ROLES) <= set(roles) or not all(map(_is_further_role, further)):
                raise KeyError(f"roles of {precision}")
        for entry in self.engines:
            if entry.role not in ROLES and not _is_tower(entry.role):
                raise KeyError(f"role of {entry.file}")
        if self.default_precision not in self.precisions:
            raise KeyError(f"default precision {self.default_precision}")


def vision_role(size: tuple[int, int]) -> str:
    """The role of the vision graph for a further image size (height, width) than the bundle's first."""
    return f"vision_{size[0]}x{size[1]}"


def parity_key(engine: str, precision: str) -> str:
    """Where ``parity`` of a manifest has an engine's figures; those of onnxruntime have no engine's name."""
    return precision if engine == "onnxruntime" else f"{engine} {precision}"


def _is_further_role(role: str) -> bool:
    return _is_tower(role) or bool(re.fullmatch(rf"({'|'.join(ROLES)}){WEIGHTS}", role))


def _is_tower(role: str) -> bool:
    """Whether it is the vision tower for a further image size (`vision_role`)."""
    return bool(re.fullmatch(r"vision_\d+x\d+", role))


def files_below(folder: Path) -> Iterable[str]:
    """Relative names of the files of a bundle, hidden ones (an editor's, a file browser's) left out."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()


def _series(version: object) -> tuple[str, ...]:
    return tuple(str(version).split(".")[:2])
