"""``python benchmarks/latency.py``: time of each stage of a bundle, beside the plain torch pipeline.

Prints a card (bytes, FLOPs, what is compared), a table for each number of threads, the cold start, and as
last line one JSON object. Every row runs in a fresh process on the same images, the rows taking turns image
by image; loading, warm-up and metrics are not timed. Memory and accuracy stand in the same row as the time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from PIL import Image

from benchmarks import card, machine, report, results
from benchmarks.examples import SIZE, Example, examples
from benchmarks.worker import PLAIN, Task
from benchmarks.workers import cold_start, measure_rows
from ppcr.checkpoint import SHIPPED, Checkpoint
from ppcr.data.graph import Split
from ppcr.errors import CommandParser, UsageError, run_cli
from ppcr.manifest import Manifest
from runtime.bundle import DEFAULT_BUNDLE

SPLIT: Split = "test"


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    made = CommandParser(description="Latency of a bundle, stage by stage, beside the plain torch pipeline.")
    made.add_argument(
        "--bundle", type=Path, default=DEFAULT_BUNDLE, metavar="DIR", help="the bundle (default: %(default)s)"
    )
    made.add_argument(
        "--checkpoint",
        type=Path,
        default=SHIPPED,
        metavar="DIR",
        help="of plain torch (default: the shipped)",
    )
    made.add_argument("--images", type=int, default=24, metavar="N", help="scenes, two expressions each")
    made.add_argument("--repeats", type=int, default=2, metavar="N", help="rounds over all images")
    made.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    made.add_argument("--precision", metavar="A,B", help="rows of the bundle (default: all it holds)")
    results.add_option(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_cli(lambda: _latency(parser().parse_args(words), words))


def _latency(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    for name in ("images", "repeats"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} must be 1 or more, not {getattr(arguments, name)}")
    if min(arguments.threads) < 1:
        raise UsageError(f"--threads must be 1 or more, not {min(arguments.threads)}")
    results.check_name(arguments.save)
    manifest = Manifest.load(arguments.bundle)
    precisions = _precisions(arguments.precision, manifest)
    for precision in precisions:
        manifest.verify(arguments.bundle, precision)
    checkpoint = Checkpoint.open(arguments.checkpoint)
    described, disturbed = machine.describe(), machine.is_busy()
    scenes = list(examples(SPLIT, range(arguments.images), expressions=2))
    work = _work(checkpoint, scenes)
    same = checkpoint.source_hash() == manifest.source
    for line in (*_compared(arguments, precisions, same), *card.lines(manifest, precisions, work)):
        print(line)
    print("machine  " + ", ".join(f"{name} {value}" for name, value in described.items()))
    if disturbed:
        # Worst where threads wait for each other by spinning, as torch's do: a ratio can be off tenfold.
        print("note     other work keeps this machine busy: do not quote these figures")
    sys.stdout.flush()

    rows: list[report.RowFigures] = []
    with tempfile.TemporaryDirectory(prefix="ppcr-latency-") as name:
        folder = Path(name)
        held, picture, expression = _write(scenes, folder)
        sources = dict.fromkeys(precisions, arguments.bundle) | {PLAIN: checkpoint.root}
        for threads in dict.fromkeys(arguments.threads):
            tasks = [
                Task(system, str(source.resolve()), str(held), threads) for system, source in sources.items()
            ]
            measured = list(measure_rows(tasks, len(scenes), arguments.repeats, folder))
            rows += report.figures(measured)
            print("", *report.table(rows[-len(measured) :]), sep="\n", flush=True)
        default = manifest.default_precision if manifest.default_precision in precisions else precisions[0]
        threads = arguments.threads[0]
        cold = cold_start(arguments.bundle.resolve(), default, threads, picture, expression)
    print("", report.cold_line(cold, default, threads), sep="\n")
    summary = report.summary(rows, cold, default, threads)
    summary |= {
        "images": len(scenes),
        "repeats": arguments.repeats,
        "same_source": same,
        "disturbed": disturbed,
    }
    if arguments.save is not None:
        record = {
            "weights_bytes": {precision: card.weights(manifest, precision) for precision in precisions},
            "flops": {stage: {k: round(v) for k, v in counts.items()} for stage, counts in work.items()},
            "rows": [row.to_json() for row in rows],
            "summary": summary,
        }
        results.save(arguments.save, "latency.py", words, described, record)
    print(json.dumps(summary))
    return 0


def _precisions(given: str | None, manifest: Manifest) -> list[str]:
    if given is None:
        return list(manifest.precisions)
    wanted = [name.strip() for name in given.split(",") if name.strip()]
    if not wanted or PLAIN in wanted:
        raise UsageError("--precision takes names separated by commas, such as fp32,int8")
    for precision in wanted:
        manifest.paths(precision)
    return list(dict.fromkeys(wanted))


def _work(checkpoint: Checkpoint, scenes: Sequence[Example]) -> dict[str, dict[str, float]]:
    # transformers takes seconds to import: only once everything else has been found in order.
    from ppcr.model.reference import ReferencePipeline

    pipeline = ReferencePipeline.load(checkpoint)
    texts = [(one.text, one.semantic.text, len(one.targets)) for scene in scenes for one in scene.expressions]
    return card.flops(pipeline, card.Conversation.of(pipeline, texts))


def _compared(arguments: argparse.Namespace, precisions: Sequence[str], same: bool) -> list[str]:
    """What the rows are, as lines of the card."""
    told = [
        f"compared  {', '.join(precisions)}: the bundle on onnxruntime; {PLAIN}: the plain pipeline, Hugging "
        "Face generate, fp32, nothing kept between turns or expressions",
        f"examples  {arguments.images} scenes of split {SPLIT!r}, {SIZE}x{SIZE}, two expressions each, "
        f"{arguments.repeats} rounds; first: an image with its first expression; second: one more about it",
    ]
    return told if same else [*told, "note      the bundle was not built from this checkpoint"]


def _write(scenes: Sequence[Example], folder: Path) -> tuple[Path, Path, str]:
    """The examples for the workers; a picture and an expression with a target for the cold start."""
    held, picture = folder / "examples.npz", folder / "scene.png"
    np.savez(
        held,
        images=np.stack([scene.image for scene in scenes]),
        truths=np.stack([scene.truths for scene in scenes]),
        expressions=np.array([[one.text for one in scene.expressions] for scene in scenes]),
    )
    choices = [(scene, one) for scene in scenes for one in scene.expressions]
    scene, expression = next((pair for pair in choices if pair[1].targets), choices[0])
    Image.fromarray(scene.image).save(picture)
    return held, picture, expression.text


if __name__ == "__main__":
    sys.exit(main())
