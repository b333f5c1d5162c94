"""Pack trained parts as a checkpoint to ship: ``python -m ppcr.training.package --mllm DIR --segmenter DIR``.

The MLLM's matrices are rounded to the int8 grid of `ppcr.int8`, so that an int8 export of the checkpoint is
exact. Weights become fp16 safetensors, config.json is written from the parts' own configurations, and the
whole replaces ``--output`` at once. A MODEL_CARD.md that lies there already is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcr.checkpoint import Checkpoint
from ppcr.config import MLLMConfig, PPCRConfig, SegmenterConfig
from ppcr.data.glossary import glossary
from ppcr.errors import CheckpointError, run_cli
from ppcr.files import atomic_directory, write_json
from ppcr.int8 import snap
from ppcr.manifest import DRAFTS
from ppcr.model.checkpoint import load_mllm, save_mllm
from ppcr.model.reference import ReferencePipeline
from ppcr.model.segmenter import Segmenter

CARD = "MODEL_CARD.md"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
DEFAULT_OUTPUT = Path("ppcr/assets/ppcr-tiny")
LIMIT_MB = 40.0
LOCATION_STEP = 8
"""A pixel of the 128 that the MLLM sees of each side: what it writes beyond that is noise."""


def package(
    mllm: Path, segmenter: Path, output: Path, *, name: str = PPCRConfig.name, int8_grid: bool = True
) -> Path:
    """Write a checkpoint of both parts to ``output`` and try it once; returns ``output``.

    Args:
        mllm: a Hugging Face directory with its tokenizer; segmenter: as `Segmenter.save` writes it.
        int8_grid: round the MLLM's matrices (but the embedding) to the int8 grid.

    Raises:
        CheckpointError: a part is missing or damaged, or the parts do not fit each other.
        OutputError: ``output`` cannot be written or holds something else.
    """
    for part, needed in ((mllm, ("config.json", *TOKENIZER_FILES)), (segmenter, ("config.json",))):
        missing = [file for file in needed if not (part / file).is_file()]
        if missing:
            raise CheckpointError(f"{part} lacks {missing[0]}: give the directory that the training wrote")
    model = load_mllm(mllm)
    try:
        mask_model = Segmenter.load(segmenter)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot read the segmenter in {segmenter}: {error}") from None
    if int8_grid:
        snap_matrices(model)
    config = _config(name, json.loads((mllm / "config.json").read_text(encoding="utf-8")), mask_model)
    with atomic_directory(output, marker="config.json") as beside:
        save_mllm(model.half(), beside / "mllm", dtype=torch.float16)
        for file in TOKENIZER_FILES:
            shutil.copyfile(mllm / file, beside / "mllm" / file)
        mask_model.save(beside / "segmenter", half=True)
        write_json(beside / "config.json", config.to_dict())
        glossary().save(beside / DRAFTS)
        if (output / CARD).is_file():
            shutil.copyfile(output / CARD, beside / CARD)
        for path in beside.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # temporary files are private, a checkpoint is not
        _try(beside)
    return output


@torch.no_grad()
def snap_matrices(model: nn.Module) -> None:
    """Move every matrix of the model but its embedding to the nearest point of the int8 grid."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = parameter.detach().flatten(1).float().cpu().numpy()
            parameter.copy_(torch.from_numpy(snap(rows)).view_as(parameter))


def size_mb(folder: Path) -> float:
    """Megabytes (10^6 bytes) of all files below ``folder``."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def _config(name: str, mllm: dict[str, Any], segmenter: Segmenter) -> PPCRConfig:
    vision, sizes = mllm["vision_config"], segmenter.config
    trained = MLLMConfig(
        family=mllm["model_type"],
        patch=vision["patch_size"],
        merge=vision["spatial_merge_size"],
        temporal=vision["temporal_patch_size"],
        location_step=LOCATION_STEP,
    )
    masks = SegmenterConfig(
        family=sizes.architecture,
        image_size=(sizes.image_size, sizes.image_size),
        mean=sizes.pixel_mean,
        std=sizes.pixel_std,
    )
    return dataclasses.replace(PPCRConfig(), name=name, mllm=trained, segmenter=masks)


def _try(folder: Path) -> None:
    # fp16 has a narrow range: a weight that became infinite must not get as far as a release.
    checkpoint = Checkpoint.open(folder)
    for tensors in (checkpoint.mllm_tensors, checkpoint.segmenter_tensors):
        for key, value in tensors.items():
            if not torch.from_numpy(value).isfinite().all():
                raise CheckpointError(f"tensor {key} of {tensors.folder.name} does not fit fp16")
    pipeline = ReferencePipeline.load(checkpoint)
    grey = torch.full((64, 64, 3), 128, dtype=torch.uint8).numpy()
    pipeline.segment(grey, "the red cube")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m ppcr.training.package``; returns the exit code."""
    return run_cli(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="ppcr.training.package", description="Pack a checkpoint to ship.")
    parser.add_argument("--mllm", type=Path, required=True, metavar="DIR", help="for example runs/mllm/mllm")
    parser.add_argument(
        "--segmenter", type=Path, required=True, metavar="DIR", help="for example runs/segmenter/segmenter"
    )
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR")
    parser.add_argument("--name", default=PPCRConfig.name)
    parser.add_argument("--no-int8-grid", action="store_true", help="leave the MLLM's weights as trained")
    options = parser.parse_args(argv)
    folder = package(
        options.mllm,
        options.segmenter,
        options.output,
        name=options.name,
        int8_grid=not options.no_int8_grid,
    )
    size = size_mb(folder)
    print(f"{folder}: {size:.1f} MB")
    if size > LIMIT_MB:
        print(f"note: more than the {LIMIT_MB:g} MB a shipped checkpoint may take")
    if not (folder / CARD).is_file():
        print(f"note: write {folder / CARD} by hand (data, recipe, held-out figures, limits)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
