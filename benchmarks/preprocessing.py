"""``python benchmarks/preprocessing.py``: pictures to model input, beside the processors of transformers.

For each family and size of photograph, ours and transformers' processors take turns in one process. They come
in two kinds: with Pillow, and with torchvision where it is installed; where both exist their pixels differ by
a step of 8 bits and more, and ours are those of the kind that the family was published with (the column
"steps" tells, before normalisation). The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import numpy.typing as npt

from benchmarks import machine, results
from benchmarks.timing import Spread
from ppcr.config import MLLMConfig, SegmenterConfig
from ppcr.errors import CommandParser, run_cli
from ppcr.framing import Framing
from ppcr.patches import image_patches

UInt8Image = npt.NDArray[np.uint8]
Processor = Callable[[UInt8Image], npt.NDArray[np.float32]]
SIZES = ((480, 640), (1200, 1600), (3000, 4000))
OURS, PILLOW, TORCHVISION = "ours", "transformers, Pillow", "transformers, torchvision"
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, standard deviation
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Family:
    """How ours and transformers' processors are made; `pixels` are the least and most of an MLLM's image."""

    name: str
    config: SegmenterConfig | MLLMConfig
    module: str
    processor: str
    pixels: tuple[int, int] = (0, 0)


FAMILIES = (
    Family("sam", SegmenterConfig("sam", (1024, 1024), *_IMAGENET, fit="pad"), "sam", "Sam"),
    Family("sam2", SegmenterConfig("sam2", (1024, 1024), *_IMAGENET, fit="stretch"), "sam2", "Sam2"),
    Family(
        "qwen2_5_vl", MLLMConfig("qwen2_5_vl", patch=14, resample="bicubic", mean=_CLIP[0], std=_CLIP[1]),
        "qwen2_vl", "Qwen2VL", (56 * 56, 28 * 28 * 1280),
    ),
    Family(
        "qwen3_vl",
        MLLMConfig("qwen3_vl", patch=16, resample="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        "qwen2_vl", "Qwen2VL", (256 * 256, 1024 * 1024),
    ),
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_cli(lambda: _main(list(sys.argv[1:] if argv is None else argv)))


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    made = CommandParser(description="Time preprocessing against the processors of transformers.")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default: %(default)s)")
    made.add_argument("--repeats", type=int, default=15, metavar="N", help="default: %(default)s")
    results.add_option(made)
    return made


def _main(words: Sequence[str]) -> int:
    import torch

    options = parser().parse_args(words)
    results.check_name(options.save)
    torch.set_num_threads(options.threads)
    if not _import_torchvision():
        print("torchvision is not installed: transformers' processors that need it are left out")
    print(f"{'family':<12}{'size':>12}  {'processor':<28}{'ms':>8}{'ours faster':>13}{'steps':>9}")
    rows = [row for family in FAMILIES for size in SIZES for row in _rows(family, size, options.repeats)]
    record = {"threads": options.threads, "rows": rows}
    about = machine.describe()
    if options.save:
        results.save(options.save, "preprocessing.py", words, about, record)
    print(json.dumps({"benchmark": "preprocessing", **record, "machine": about}))
    return 0


def _rows(family: Family, size: tuple[int, int], repeats: int) -> list[dict[str, Any]]:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    systems = {OURS: _ours(family, size), **_theirs(family)}
    answers = {name: run(image) for name, run in systems.items()}
    seconds = _in_turns(systems, image, repeats)
    rows = []
    for name, spread in seconds.items():
        steps = float(np.abs(answers[name] - answers[OURS]).max() * max(family.config.std) * 255)
        ratio = spread.p50 / seconds[OURS].p50
        told = "" if name == OURS else f"{ratio:>12.2f}x{steps:>9.2f}"
        size_told = f"{size[0]}x{size[1]}"
        print(f"{family.name:<12}{size_told:>12}  {name:<28}{1e3 * spread.p50:>8.2f}{told}")
        rows.append({
            "family": family.name, "height": size[0], "width": size[1], "processor": name,
            **spread.to_json(), "ours_faster": round(ratio, 2), "largest_difference_steps": round(steps, 4),
        })  # fmt: skip
    return rows


def _in_turns(systems: Mapping[str, Processor], image: UInt8Image, repeats: int) -> dict[str, Spread]:
    taken: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, run in systems.items():
            start = time.perf_counter()
            run(image)
            taken[name].append(time.perf_counter() - start)
    return {name: Spread.of(seconds) for name, seconds in taken.items()}


def _ours(family: Family, size: tuple[int, int]) -> Processor:
    config = family.config
    if isinstance(config, SegmenterConfig):
        return Framing.of(size, config).pixels
    # What the processor would choose; a bundle has a few fixed sizes instead (`ppcr.patches`).
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    fitted = smart_resize(*size, config.patch * config.merge, *family.pixels)
    return lambda image: image_patches(image, fitted, config)


def _theirs(family: Family) -> dict[str, Processor]:
    low, high = family.pixels
    config, options = family.config, {}
    if isinstance(config, MLLMConfig):
        options = {
            "patch_size": config.patch, "image_mean": list(config.mean), "image_std": list(config.std),
            "size": {"shortest_edge": low, "longest_edge": high},
        }  # fmt: skip
    found: dict[str, Processor] = {}
    for name, part, ending in ((PILLOW, "pil_", "Pil"), (TORCHVISION, "", "")):
        module = f"transformers.models.{family.module}.image_processing_{part}{family.module}"
        if importlib.util.find_spec(module) is None or (name == TORCHVISION and not _import_torchvision()):
            continue
        kind = getattr(importlib.import_module(module), f"{family.processor}ImageProcessor{ending}")
        tensors = "np" if name == PILLOW else "pt"
        found[name] = _calling(kind(**options), tensors, batched=isinstance(config, SegmenterConfig))
    return found


def _calling(made: Any, tensors: str, *, batched: bool) -> Processor:
    def run(image: UInt8Image) -> npt.NDArray[np.float32]:
        pixels = made(images=image, input_data_format="channels_last", return_tensors=tensors)["pixel_values"]
        return np.asarray(pixels[0] if batched else pixels)

    return run


def _import_torchvision() -> bool:
    """Whether torchvision can be imported.

    Its compiled operators do not load beside a build of torch for another device, and without them it refuses
    to be imported. No processor calls one: that they are declared is enough.
    """
    if importlib.util.find_spec("torchvision") is None:
        return False
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")
    return True


if __name__ == "__main__":
    raise SystemExit(main())
