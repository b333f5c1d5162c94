"""``python benchmarks/segmenter.py --checkpoint CKPT --bundle DIR``: the segmenter by itself, beside torch.

Torch eager and every precision of the bundle take turns on one image in one process: encoding it, one box,
and many boxes. Prints a table and as last line one JSON object. Needs no MLLM: the boxes are given.

Agreement is mask IoU with the torch reference over the many boxes. They lie anywhere, and what a box around
nothing in particular holds is a matter of a pixel: the line below the table says how far the reference agrees
with itself when each side moves by up to one pixel of the input. Reduced precisions may differ as much.

``--openvino`` adds OpenVINO on the same graphs, in fp32 and, where the processor can, in bfloat16.

Factors are against torch eager: the official package of MobileSAM where ``--official mobile_sam.pt`` adds it
(`benchmarks.official`), else the torch reference, which computes the same with less work.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import numpy.typing as npt

from benchmarks import machine, official, results
from benchmarks.systems import framing_of, placed
from benchmarks.timing import Spread
from ppcr import images, masks
from ppcr.config import PPCRConfig
from ppcr.errors import CommandParser, EngineError, UsageError, run_cli
from ppcr.framing import Framing
from runtime.bundle import DEFAULT_BUNDLE, Bundle
from runtime.session import Prompts, SegmenterSession

Float32Array = npt.NDArray[np.float32]
TORCH = "torch"
PARTS = ("encode", "one box", "many boxes")
# Below this agreement with torch a speed-up does not count. See `least` for the reduced precisions.
_REDUCED = 0.95
_LEAST_IOU = {
    TORCH: 0.0, official.NAME: 0.995, "fp32": 0.995, "openvino fp32": 0.995,
    "int8": _REDUCED, "openvino bf16": _REDUCED,
}  # fmt: skip


@dataclass(frozen=True)
class System:
    """One row: `encode` pixels f32 [3, S, S]; `decode` the features with prompts to logits f32 [N, h, w]."""

    name: str
    encode: Callable[[Float32Array], Any]
    decode: Callable[[Any, Prompts], Float32Array]


@dataclass
class Times:
    """Seconds of each repeat, by part: waited for, and of the processor."""

    wall: dict[str, list[float]]
    cpu: dict[str, list[float]]

    @classmethod
    def empty(cls) -> Times:
        return cls({part: [] for part in PARTS}, {part: [] for part in PARTS})

    def run(self, part: str, body: Callable[[], Any]) -> Any:
        """What ``body`` answers, timed as ``part``."""
        wall, cpu = time.perf_counter(), time.process_time()
        answer = body()
        self.wall[part].append(time.perf_counter() - wall)
        self.cpu[part].append(time.process_time() - cpu)
        return answer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_cli(lambda: _main(parser().parse_args(words), words))


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    made = CommandParser(description="Latency of a segmenter: torch eager and a bundle's precisions.")
    made.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="what the bundle is of")
    made.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, metavar="DIR")
    made.add_argument("--official", type=Path, metavar="PT", help="mobile_sam.pt, for its own package's row")
    made.add_argument("--openvino", action="store_true", help="rows of OpenVINO as well")
    made.add_argument("--image", type=Path, metavar="FILE", help="default: random pixels, 640x480")
    made.add_argument("--boxes", type=int, default=16, metavar="N", help="the many (default: %(default)s)")
    made.add_argument("--repeats", type=int, default=5, metavar="N", help="default: %(default)s")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    results.add_option(made)
    return made


def _main(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    results.check_name(arguments.save)
    if min(arguments.boxes, arguments.repeats, arguments.threads) < 1:
        raise UsageError("--boxes, --repeats and --threads must be 1 or more")
    bundles = _bundles(arguments.bundle)
    config = next(iter(bundles.values())).config
    image = _image(arguments.image)
    framing = framing_of(image, config)
    pixels = framing.pixels(image)
    torch_row = torch_system(arguments.checkpoint, config, arguments.threads)
    systems = [torch_row, *(engine(bundle, arguments.threads) for bundle in bundles.values())]
    if arguments.openvino:
        systems += openvino_systems(next(iter(bundles.values())), arguments.threads)
    if arguments.official is not None:
        systems.insert(0, official_system(arguments.official, config, arguments.threads))
    plain = systems[0].name
    width = next(iter(bundles.values())).embedding.shape[1]
    one, many = (box_prompts(count, width, framing) for count in (1, arguments.boxes))
    times, drawn = turns(systems, pixels, one, many, arguments.repeats)
    agreement = {name: _mean_iou(found, drawn[TORCH]) for name, found in drawn.items()}
    nudged = torch_row.decode(torch_row.encode(pixels), moved(many, config.segmenter.image_size))
    yardstick = _mean_iou(nudged, drawn[TORCH])
    rows = {system.name: figures(times[system.name], times[plain]) for system in systems}
    for name, row in rows.items():
        row["mean_mask_iou"] = round(agreement[name], 5)
        row["counts"] = agreement[name] >= least(name, yardstick)
    print(f"{image.shape[1]}x{image.shape[0]} image, {arguments.boxes} boxes, threads: {arguments.threads}")
    print(*table(rows), sep="\n")
    print(f"torch with boxes moved by up to a pixel: mask IoU {yardstick:.4f}")
    result = {
        "benchmark": "segmenter",
        "family": config.segmenter.family,
        "boxes": arguments.boxes,
        "threads": arguments.threads,
        "factors_against": plain,
        "torch_with_boxes_moved_by_a_pixel": round(yardstick, 5),
        "rows": rows,
    }
    if arguments.save is not None:
        results.save(arguments.save, "segmenter.py", words, machine.describe(), result)
    print(
        json.dumps({**result, "load_1min": machine.describe()["load_1min"], "versions": machine.versions()})
    )
    return 0


def torch_system(checkpoint: Path, config: PPCRConfig, threads: int) -> System:
    """The torch reference of a checkpoint's segmenter.

    Raises:
        CheckpointError, UsageError: unreadable, or not what the bundle was built from.
    """
    import torch

    from ppcr.checkpoint import Checkpoint
    from ppcr.errors import CheckpointError
    from ppcr.model.segmenters import load_segmenter

    opened = Checkpoint.open(checkpoint)
    if opened.config.segmenter != config.segmenter:
        raise UsageError(f"the bundle was not built from {checkpoint}: their segmenters differ")
    torch.set_num_threads(threads)
    try:
        model = load_segmenter(opened.segmenter)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {opened.segmenter}: {error}") from None

    def encode(pixels: Float32Array) -> Any:
        with torch.inference_mode():
            return model.encode(torch.from_numpy(pixels)[None])

    def decode(features: Any, prompts: Prompts) -> Float32Array:
        given = (torch.from_numpy(np.ascontiguousarray(part)) for part in vars(prompts).values())
        with torch.inference_mode():
            return np.asarray(model.decode(features, *given)[0].numpy(), np.float32)

    return System(TORCH, encode, decode)


def official_system(weights: Path, config: PPCRConfig, threads: int) -> System:
    """MobileSAM's own package. Raises as `Official.load` does, and UsageError for another family's bundle."""
    if config.segmenter.family != "mobile_sam":
        raise UsageError("--official belongs to a bundle of MobileSAM")
    model = official.Official.load(weights, threads=threads)

    def decode(features: Any, prompts: Prompts) -> Float32Array:
        return np.asarray(model.decode(features, prompts.boxes)[:, 0].numpy(), np.float32)

    return System(official.NAME, model.encode, decode)


def engine(bundle: Bundle, threads: int) -> System:
    """A bundle's segmenter on onnxruntime."""
    from runtime.onnxruntime_session import load_segmenter

    session = load_segmenter(bundle, threads=threads)
    return System(
        bundle.precision, session.encode, lambda features, given: session.decode(features, given)[0]
    )


def openvino_systems(bundle: Bundle, threads: int) -> list[System]:
    """A bundle's segmenter on OpenVINO, in fp32 and, where this processor has instructions for it, in bf16.

    Raises:
        EngineError: OpenVINO is not installed. BundleError: it cannot read the graphs.
    """
    try:
        from runtime.openvino_session import load_segmenter
    except ImportError:
        raise EngineError("OpenVINO is not installed: pip install '.[openvino]'") from None
    made = []
    for precision in ("fp32", "bf16"):
        try:
            session = load_segmenter(bundle, threads=threads, precision=precision)
        except EngineError:
            if precision == "fp32":
                raise
            continue

        def decode(features: Any, given: Prompts, session: SegmenterSession = session) -> Float32Array:
            return session.decode(features, given)[0]

        made.append(System(f"openvino {precision}", session.encode, decode))
    return made


def box_prompts(count: int, width: int, framing: Framing) -> Prompts:
    """``count`` boxes spread over the image, without text."""
    rng = np.random.default_rng(count)
    low = rng.uniform(0, 0.6, (count, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.1, 0.4, (count, 2))], axis=1).astype(np.float32)
    points = ((boxes[:, :2] + boxes[:, 2:]) / 2).astype(np.float32)
    text = np.zeros((count, 1, width), np.float32)
    valid = np.ones(count, np.float32)
    return placed(Prompts(boxes, points, valid, text, np.zeros((count, 1), np.bool_)), framing)


def turns(
    systems: Sequence[System], pixels: Float32Array, one: Prompts, many: Prompts, repeats: int
) -> tuple[dict[str, Times], dict[str, Float32Array]]:
    """Each system's times, the systems taking turns, and its logits for the many boxes."""
    times = {system.name: Times.empty() for system in systems}
    drawn = {}
    for system in systems:  # warm-up, which does not count
        drawn[system.name] = system.decode(system.encode(pixels), many)
    for _ in range(repeats):
        for system in systems:
            clock, decode = times[system.name], system.decode
            features = clock.run("encode", lambda s=system: s.encode(pixels))  # type: ignore[misc]
            clock.run("one box", lambda d=decode, f=features: d(f, one))  # type: ignore[misc]
            clock.run("many boxes", lambda d=decode, f=features: d(f, many))  # type: ignore[misc]
    return times, drawn


def figures(times: Times, plain: Times) -> dict[str, Any]:
    """Median seconds of a row, and how many times faster than ``plain`` it is."""
    row: dict[str, Any] = {}
    for part in PARTS:
        row[part] = {**Spread.of(times.wall[part]).to_json(), "cpu_p50_s": _median(times.cpu[part])}
    for name, part in (("image and one box", "one box"), ("image and many boxes", "many boxes")):
        mine, theirs = (np.median(np.add(t.wall["encode"], t.wall[part])) for t in (times, plain))
        cpu = [np.median(np.add(t.cpu["encode"], t.cpu[part])) for t in (times, plain)]
        row[name] = {
            "p50_s": round(float(mine), 6),
            "speedup": round(float(theirs / mine), 3),
            "cpu_speedup": round(float(cpu[1] / cpu[0]), 3),
        }
    for part in PARTS:
        row[part]["speedup"] = round(_median(plain.wall[part]) / _median(times.wall[part]), 3)
        row[part]["cpu_speedup"] = round(_median(plain.cpu[part]) / _median(times.cpu[part]), 3)
    return row


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Lines: milliseconds waited (of the processor) and speed-up of parts, factors of image with boxes."""
    wholes = ("image and one box", "image and many boxes")
    head = "".join(f"{part:>30}" for part in PARTS) + "".join(f"{whole:>22}" for whole in wholes)
    lines = [f"{'':<14}{head}{'mask IoU':>10}"]
    for name, row in rows.items():

        def factor(cell: dict[str, Any], counts: bool = row["counts"]) -> str:
            return f"{cell['speedup']:.2f}x" if counts else "wrong"

        cells = []
        for part in PARTS:
            cell = row[part]
            shown = f"{1e3 * cell['p50_s']:.1f} ({1e3 * cell['cpu_p50_s']:.1f}) ms {factor(cell)}"
            cells.append(f"{shown:>30}")
        cells += [f"{factor(row[whole]):>22}" for whole in wholes]
        lines.append(f"{name:<14}{''.join(cells)}{row['mean_mask_iou']:>10.4f}")
    return lines


def least(name: str, yardstick: float) -> float:
    """The agreement with torch that row ``name`` owes; ``yardstick``: torch's with itself, boxes moved."""
    owed = _LEAST_IOU.get(name, 1.0)
    return owed if owed > _REDUCED else min(owed, yardstick)


def moved(prompts: Prompts, side: tuple[int, int]) -> Prompts:
    """``prompts``, each side of a box moved by up to a pixel of an input of ``side`` (height, width)."""
    pixel = np.array([1 / side[1], 1 / side[0]] * 2)
    shift = np.random.default_rng(0).uniform(-1, 1, prompts.boxes.shape) * pixel
    return replace(prompts, boxes=(prompts.boxes + shift).astype(np.float32))


def _mean_iou(found: Float32Array, wanted: Float32Array) -> float:
    return float(np.mean([masks.iou(a > 0, b > 0) for a, b in zip(found, wanted, strict=True)]))


def _bundles(folder: Path) -> dict[str, Bundle]:
    first = Bundle.load(folder)
    names = first.manifest.precisions
    return {name: first if name == first.precision else Bundle.load(folder, precision=name) for name in names}


def _image(path: Path | None) -> npt.NDArray[np.uint8]:
    if path is not None:
        return images.load_image(path)
    coarse = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return images.resize(coarse, (480, 640))


def _median(seconds: Sequence[float]) -> float:
    return round(float(np.median(seconds)), 6)


if __name__ == "__main__":
    sys.exit(main())
