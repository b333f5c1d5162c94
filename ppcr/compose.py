"""``python -m ppcr.compose --mllm … --segmenter … --output ckpt/``: public weights to a checkpoint.

The MLLM's directory is copied unchanged. The segmenter gets a path for text that adds nothing until trained,
so that before training it is the box-prompted SAM it was made from. The checkpoint is built beside its place
and renamed into it: an error, or Ctrl-C, leaves nothing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcr import pretrained
from ppcr.checkpoint import Checkpoint
from ppcr.config import MLLMConfig, PPCRConfig, SegmenterConfig
from ppcr.errors import CheckpointError, CommandParser, run_cli
from ppcr.files import atomic_directory, read_json, write_json
from ppcr.tensors import TensorFiles

if TYPE_CHECKING:
    from ppcr.model.sam import SamSegmenter

# A folder that holds this is a checkpoint, which may be replaced by a new one.
_MARKER = "segmenter/config.json"
_CARD = """# {name}

Composed of public weights, not trained as a whole.

- MLLM: `{mllm}` ({family}), unchanged.
- Segmenter: `{segmenter}` ({architecture}). Its path for the semantic prompt's text is new and adds nothing
  until trained: masks are those of the segmenter prompted with {prompts}.

Accuracy was not measured by composing. The licences of both sources apply.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_cli(lambda: _main(argv))


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    out = CommandParser(description="Compose a checkpoint of a public MLLM and a public segmenter.")
    either = "a directory, or a name on the Hugging Face hub"
    out.add_argument("--mllm", required=True, metavar="DIR_OR_HUB_ID", help=either)
    out.add_argument(
        "--segmenter",
        required=True,
        metavar="DIR_OR_HUB_ID_OR_PT",
        help=f"SAM or SAM 2: {either}; MobileSAM: its official mobile_sam.pt",
    )
    out.add_argument("--output", type=Path, required=True, metavar="DIR", help="the checkpoint to write")
    out.add_argument("--name", help="of the checkpoint (default: the output's)")
    out.add_argument(
        "--points", action="store_true", help="prompt the segmenter with points beside boxes (default: boxes)"
    )
    return out


def _main(argv: Sequence[str] | None) -> int:
    options = parser().parse_args(argv)
    from ppcr.model.hub import locate

    mllm = locate(options.mllm)
    speech, convention = spoken_to(mllm)
    require_whole(mllm)
    segmenter = read_segmenter(locate(options.segmenter), hidden_size(mllm), points=options.points)
    name = options.name or options.output.resolve().name
    with atomic_directory(options.output, marker=_MARKER) as part:
        shutil.copytree(mllm, part / "mllm")
        segmenter.save(part / "segmenter")
        config = PPCRConfig(name=name, box_convention=convention, mllm=speech, segmenter=fed_with(segmenter))
        write_json(part / "config.json", config.to_dict())
        card = _CARD.format(
            name=name,
            mllm=options.mllm,
            family=speech.family,
            segmenter=options.segmenter,
            architecture=segmenter.config.architecture,
            prompts="boxes and points" if options.points else "boxes alone",
        )
        (part / "MODEL_CARD.md").write_text(card, encoding="utf-8")
        Checkpoint.open(part)
    print(f"checkpoint: {options.output}")
    return 0


def read_segmenter(path: Path, text_dim: int, *, points: bool = False) -> SamSegmenter:
    """A public segmenter, with a path for texts of ``text_dim`` wide embeddings.

    Raises:
        CheckpointError: of no architecture known here, incomplete or damaged.
    """
    from ppcr.model.sam_import import TextPath, load_mobile_sam, load_transformers

    text = TextPath(text_dim=text_dim, points=points)
    return load_transformers(path, text) if path.is_dir() else load_mobile_sam(path, text)


def fed_with(segmenter: SamSegmenter) -> SegmenterConfig:
    """How images come to a public segmenter: SAM 2 stretches them, the others pad."""
    config = segmenter.config
    return SegmenterConfig(
        family=config.architecture,
        image_size=(config.image_size, config.image_size),
        mean=config.pixel_mean,
        std=config.pixel_std,
        fit="stretch" if config.architecture == "sam2" else "pad",
    )


def spoken_to(mllm: Path) -> tuple[MLLMConfig, str]:
    """How the MLLM in a directory is spoken to, and its box convention.

    That of a PPCR checkpoint as it was trained; a public one by zero-shot instructions (`ppcr.zero_shot`).

    Raises:
        CheckpointError: of an architecture whose prompts are not known.
    """
    _config(mllm)
    beside = mllm.resolve().parent
    if (beside / "config.json").is_file() and (beside / "mllm").resolve() == mllm.resolve():
        whole = PPCRConfig.load(beside)
        return whole.mllm, whole.box_convention
    return pretrained.spoken_to(mllm)


def require_whole(mllm: Path) -> None:
    """Check that the MLLM's weights and tokenizer are there, before gigabytes are copied.

    Raises:
        CheckpointError: names the file that is missing or cut short.
    """
    if not TensorFiles(mllm):
        raise CheckpointError(f"{mllm} holds no weights: copy the whole model")
    if not (mllm / "tokenizer.json").is_file():
        raise CheckpointError(f"{mllm} holds no tokenizer.json: copy the whole model")


def hidden_size(mllm: Path) -> int:
    """Width of the MLLM's input embedding.

    Raises:
        CheckpointError: its config.json does not say.
    """
    values = _config(mllm)
    text = values.get("text_config")
    found = (text if isinstance(text, dict) else values).get("hidden_size")
    if not isinstance(found, int):
        raise CheckpointError(f"{mllm / 'config.json'} gives no hidden_size: it is of another architecture")
    return found


def _config(folder: Path) -> dict[str, Any]:
    missing = f"{folder} holds no config.json: give the directory of a Hugging Face MLLM"
    return read_json(folder / "config.json", CheckpointError, missing=missing)


if __name__ == "__main__":
    sys.exit(main())
