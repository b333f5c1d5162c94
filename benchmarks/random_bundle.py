"""Public models at full size with random weights, composed and exported on the spot: ``--random-weights``.

What a request costs does not depend on what the weights say; how many tokens it takes is fixed
(`benchmarks.fixed_answers`). The tokenizer is trained here, on the texts that will be asked, so that a prompt
is about as long as with the published one; the embedding table and the logits have the published size.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.examples import Example
from benchmarks.random_model import MODELS, write_random
from benchmarks.workers import failure
from ppcr.config import PPCRConfig, SegmenterConfig
from ppcr.errors import BundleError, UsageError
from ppcr.files import atomic_directory, write_json
from ppcr.manifest import MANIFEST, Manifest

if TYPE_CHECKING:
    from ppcr.model.sam import SamSegmenter

PREFIX = "random "
"""How the names of such checkpoints and bundles begin."""
_VOCABULARY = 8192
_MARKER = "segmenter/config.json"


@dataclass(frozen=True)
class RandomModel:
    """A composed checkpoint and its bundle. note: what it is, and what it lacks of the published model."""

    spec: str
    checkpoint: Path
    bundle: Path
    note: str


def parse(spec: str) -> tuple[str, str]:
    """Names of `benchmarks.random_model.MODELS` and `SEGMENTERS` from "qwen2.5-vl-3b+mobile-sam".

    Raises:
        UsageError: not of that form, or not known.
    """
    mllms = {_spelled(name): name for name in MODELS}
    mllm, plus, segmenter = spec.strip().lower().partition("+")
    if not plus or mllm not in mllms or segmenter not in SEGMENTERS:
        told = f"{', '.join(mllms)}, then + and one of {', '.join(SEGMENTERS)}"
        raise UsageError(f"--random-weights does not know {spec!r}: give one of {told}")
    return mllms[mllm], segmenter


def _spelled(model: str) -> str:
    """A model as the command line spells it: qwen2.5-vl-3b for qwen2_5_vl-3B."""
    return model.replace("2_5", "2.5").replace("_", "-").lower()


def build(
    spec: str,
    folder: Path,
    precisions: Sequence[str],
    examples: Sequence[Example],
    *,
    layers: int | None = None,
    say: Callable[[str], None] = print,
) -> RandomModel:
    """Compose and export ``spec`` below ``folder``, or take what was built there before.

    precisions: of the bundle. examples: whose expressions will be asked. layers: of the decoder and of the
    vision tower, instead of the published numbers.

    Raises:
        UsageError: an unknown spec. OutputError: the place cannot be written. PPCRError: the export failed.
    """
    mllm, segmenter = parse(spec)
    name = f"{spec.strip().lower()}{'' if layers is None else f'-{layers}-layers'}"
    root = folder.resolve() / name.replace("+", "-")
    checkpoint, bundle = root / "checkpoint", root / "bundle"
    depth = "published depth" if layers is None else f"reduced to {layers} layers of decoder and vision tower"
    made = RandomModel(spec, checkpoint, bundle, f"random weights, {depth}; answers of fixed lengths")
    if _holds(bundle, precisions):
        say(f"random    {name}: as built before")
        return made
    say(f"random    {name}: composing")
    with atomic_directory(checkpoint, marker=_MARKER) as part:
        _compose(PREFIX + name, mllm, segmenter, part, examples, layers)
    say(f"random    {name}: exporting {', '.join(precisions)}")
    # A process of its own, whose memory is free again when rows are measured.
    command = [sys.executable, "-m", "export.build_engines", "--checkpoint", str(checkpoint)]
    command += ["--output", str(bundle), "--precision", ",".join(precisions), "--no-parity"]
    here = Path(__file__).resolve().parents[1]
    run = subprocess.run(command, cwd=here, text=True, capture_output=True)
    if run.returncode:
        raise failure(run.returncode, run.stderr, f"export of {name}")
    return made


def _holds(bundle: Path, precisions: Sequence[str]) -> bool:
    if not (bundle / MANIFEST).is_file():
        return False
    try:
        return set(precisions) <= set(Manifest.load(bundle).precisions)
    except BundleError:
        return False


def _compose(
    name: str, mllm: str, segmenter: str, root: Path, examples: Sequence[Example], layers: int | None
) -> None:
    """A checkpoint as `ppcr.compose` lays it out."""
    from ppcr.pretrained import spoken_to

    folder = root / "mllm"
    folder.mkdir()
    config = write_random(mllm, folder, layers=layers, vision_depth=layers)
    _write_tokenizer(folder, examples)
    speech, convention = spoken_to(folder)
    made = SEGMENTERS[segmenter](config.get("text_config", config)["hidden_size"], root)
    made.save(root / "segmenter")
    sizes = made.config
    fed = SegmenterConfig(
        family=sizes.architecture,
        image_size=(sizes.image_size, sizes.image_size),
        mean=sizes.pixel_mean,
        std=sizes.pixel_std,
        fit="stretch" if sizes.architecture == "sam2" else "pad",
    )
    whole = PPCRConfig(name=name, box_convention=convention, mllm=speech, segmenter=fed)
    write_json(root / "config.json", whole.to_dict())


def _write_tokenizer(folder: Path, examples: Sequence[Example]) -> None:
    """tokenizer.json, and its ids of the image's tokens in config.json."""
    from ppcr.model.tokenizer import train_tokenizer
    from ppcr.prompts import (
        IMAGE_PAD,
        LOCATION_BINS,
        SPECIAL_TOKENS,
        VIDEO_PAD,
        VISION_END,
        VISION_START,
    )
    from ppcr.zero_shot import ZeroShotTexts, written

    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    texts = ZeroShotTexts(config["model_type"])
    # Learned with the rest, these texts come out in about as many tokens as in Qwen's own vocabulary.
    fixed = [texts.before_image, texts.after_image, texts.after_expression, texts.between_stages]
    fixed += [written([[1, 2, 3, 4]] * count) for count in (1, 2)]
    asked = [
        text for example in examples for one in example.expressions for text in (one.text, one.semantic.text)
    ]
    # Special and location tokens come on top.
    room = config.get("text_config", config)["vocab_size"] - len(SPECIAL_TOKENS) - LOCATION_BINS
    tokenizer = train_tokenizer([*fixed * 50, *asked], text_vocabulary=min(_VOCABULARY, room))
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {
        "image_token_id": IMAGE_PAD, "video_token_id": VIDEO_PAD,
        "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
    }  # fmt: skip
    path.write_text(
        json.dumps(config | {key: tokenizer.token_to_id(text) for key, text in ids.items()}, indent=1)
    )


def _mobile_sam(text_dim: int, _: Path) -> SamSegmenter:
    import torch

    from ppcr.model.sam import SamSegmenter
    from ppcr.model.sam_config import SamConfig
    from ppcr.model.tiny_vit import TinyViTSizes

    torch.manual_seed(0)
    sizes = SamConfig(architecture="mobile_sam", encoder=asdict(TinyViTSizes()), text_dim=text_dim)
    return SamSegmenter(sizes).eval()


def _sam_vit_b(text_dim: int, work: Path) -> SamSegmenter:
    from transformers import SamConfig, SamModel

    return _from_public(SamModel, SamConfig(), text_dim, work)  # transformers' defaults are ViT-B


def _sam2_tiny(text_dim: int, work: Path) -> SamSegmenter:
    from transformers import Sam2Config, Sam2Model

    return _from_public(Sam2Model, Sam2Config(), text_dim, work)  # and Hiera-tiny


def _from_public(kind: Any, config: Any, text_dim: int, work: Path) -> SamSegmenter:
    """A public segmenter drawn at random, written as its package does and read as public weights are."""
    import torch

    from ppcr.model.sam_import import TextPath, load_transformers

    torch.manual_seed(0)
    beside = work / "public"
    kind(config).save_pretrained(beside)
    try:
        return load_transformers(beside, TextPath(text_dim=text_dim))
    finally:
        shutil.rmtree(beside)


SEGMENTERS: dict[str, Callable[[int, Path], SamSegmenter]] = {
    "mobile-sam": _mobile_sam,
    "sam-vit-b": _sam_vit_b,
    "sam2-tiny": _sam2_tiny,
}
"""Name -> segmenter for texts of a width; the folder is a place for files on the way."""
