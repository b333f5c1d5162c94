"""``python benchmarks/latency.py``: time of each stage of a bundle, beside the plain torch pipeline.

Prints a card (bytes, FLOPs, what is compared), a table for each number of threads, the cold start, and as
last line one JSON object. Every row runs in a fresh process on the same images, the rows taking turns image
by image; loading, warm-up and metrics are not timed. Memory and accuracy stand in the same row as the time.

More on request: ``--engine`` (rows of other engines), ``--floor`` (what each stage takes at least on this
machine), ``--waterfall`` (from plain torch to the fastest engine, step by step), ``--batch`` (expressions of
one image together), ``--timeline`` (a picture of one request), ``--random-weights`` (models of full size).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import card, machine, random_bundle, results, timeline
from benchmarks.examples import SIZE, Example, examples
from benchmarks.latency_model import Model, undrafted, work_of
from benchmarks.latency_run import Wanted, measure
from benchmarks.rows import DEFAULT, engines_named, plan
from benchmarks.worker import PLAIN
from ppcr.checkpoint import SHIPPED, Checkpoint
from ppcr.data.graph import Split
from ppcr.errors import CommandParser, UsageError, run_cli
from ppcr.manifest import DRAFTS, Manifest
from runtime.bundle import AUTO, DEFAULT_BUNDLE
from runtime.threads import count_threads

SPLIT: Split = "test"
RANDOM_PRECISIONS = ("int4", "int8")


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
    made.add_argument("--precision", metavar="A,B", help="rows of each engine (default: all it can)")
    made.add_argument(
        "--engine", default=f"{AUTO},{DEFAULT}", metavar="A,B", help="names, or all (default: %(default)s)"
    )
    made.add_argument("--without-torch", action="store_true", help="leave the row of plain torch out")
    made.add_argument("--floor", action="store_true", help="what each stage takes at least on this machine")
    made.add_argument("--waterfall", action="store_true", help="from plain torch step by step, with accuracy")
    made.add_argument("--batch", type=int, metavar="N", help="N expressions of one image, in three ways")
    made.add_argument("--timeline", type=Path, metavar="PNG", help="draw one request of the first row")
    made.add_argument(
        "--random-weights",
        nargs="+",
        metavar="MLLM+SEGMENTER",
        help=f"build these instead, such as qwen2.5-vl-3b+mobile-sam; segmenters: "
        f"{', '.join(random_bundle.SEGMENTERS)} (--precision: default {','.join(RANDOM_PRECISIONS)})",
    )
    made.add_argument("--layers", type=int, metavar="N", help="with --random-weights: fewer than published")
    made.add_argument(
        "--work", type=Path, metavar="DIR", help="with --random-weights: where models are built and kept"
    )
    results.add_option(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_cli(lambda: _latency(parser().parse_args(words), words))


def _latency(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    _check(arguments)
    engines = engines_named(arguments.engine)
    shipped = None if arguments.random_weights else _shipped(arguments, engines)
    described, disturbed = machine.describe(), machine.is_busy()
    wanted = Wanted(
        repeats=arguments.repeats,
        threads=tuple(dict.fromkeys(arguments.threads)),
        torch=not arguments.without_torch,
        floor=arguments.floor,
        waterfall=arguments.waterfall,
        batch=arguments.batch,
        timeline=arguments.timeline,
    )
    scenes = list(examples(SPLIT, range(arguments.images), expressions=wanted.expressions))
    records: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="ppcr-latency-") as name:
        for spec in arguments.random_weights or [None]:
            place = Path(name) if arguments.work is None else arguments.work
            model = shipped or _random(arguments, spec, engines, scenes, place)
            work = work_of(model, scenes)
            for line in (*_compared(arguments, model), *card.lines(model.manifest, model.stored, work)):
                print(line)
            print("machine  " + ", ".join(f"{key} {value}" for key, value in described.items()))
            if disturbed:
                # Worst where threads wait for each other by spinning, as torch's do: tenfold off is possible.
                print("note     other work keeps this machine busy: do not quote these figures")
            sys.stdout.flush()
            record, listed = measure(model, scenes, work, wanted)
            records.append(record)
            runs += listed
    common = {"images": len(scenes), "repeats": arguments.repeats, "disturbed": disturbed}
    summary = {**records[0]["summary"], **common}
    if len(records) > 1:
        summary["models"] = {record["summary"]["model"]: record["summary"] for record in records}
    if arguments.save is not None:
        whole = records[0] if len(records) == 1 else {"models": records}
        results.save(arguments.save, "latency.py", words, described, {**whole, "summary": summary})
        results.save_runs(arguments.save, "latency.py", words, described, runs)
    print(json.dumps(summary))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be, before anything is built or measured."""
    for name in ("images", "repeats", "batch", "layers"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be 1 or more, not {value}")
    for threads in arguments.threads:
        count_threads(threads)
    for spec in arguments.random_weights or ():
        random_bundle.parse(spec)
    if arguments.random_weights is None:
        for name in ("layers", "work"):
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name} belongs to --random-weights")
    if arguments.waterfall and arguments.without_torch:
        raise UsageError("--waterfall begins with plain torch: leave out --without-torch")
    if arguments.timeline is not None:
        timeline.check(arguments.timeline)
    results.check_name(arguments.save)
    _precisions(arguments.precision)


def _precisions(given: str | None) -> list[str] | None:
    if given is None:
        return None
    wanted = [name.strip() for name in given.split(",") if name.strip()]
    if not wanted or PLAIN in wanted:
        raise UsageError("--precision takes names separated by commas, such as fp32,int8")
    return list(dict.fromkeys(wanted))


def _shipped(arguments: argparse.Namespace, engines: Sequence[str]) -> Model:
    """The bundle and the checkpoint of the command line, checked, with the rows they give."""
    model = _model(arguments, arguments.bundle, arguments.checkpoint, engines)
    for stored in model.stored:
        model.manifest.verify(arguments.bundle, stored)
    return model


def _random(
    arguments: argparse.Namespace, spec: str, engines: Sequence[str], scenes: Sequence[Example], work: Path
) -> Model:
    """A model of random weights, built now or before, with the rows it gives."""
    precisions = _precisions(arguments.precision) or RANDOM_PRECISIONS
    made = random_bundle.build(spec, work, precisions, scenes, layers=arguments.layers)
    return _model(arguments, made.bundle, made.checkpoint, engines, note=made.note)


def _model(
    arguments: argparse.Namespace, bundle: Path, root: Path, engines: Sequence[str], *, note: str = ""
) -> Model:
    manifest = Manifest.load(bundle)
    checkpoint = Checkpoint.open(root)
    rows, left_out = plan(bundle, manifest, engines, _precisions(arguments.precision), checkpoint=root)
    same = checkpoint.source_hash() == manifest.source
    return Model(
        bundle.resolve(),
        checkpoint,
        manifest,
        tuple(rows),
        left_out,
        note=note if same else "the bundle was not built from this checkpoint",
        same_source=same,
        random=manifest.name.startswith(random_bundle.PREFIX),
    )


def _compared(arguments: argparse.Namespace, model: Model) -> list[str]:
    """What the rows are, as lines of the card."""
    names: dict[str, list[str]] = {}
    for row in model.rows:
        names.setdefault(row.engine, []).append(row.name)
    told = "; ".join(f"{', '.join(listed)}: the bundle on {engine}" for engine, listed in names.items())
    if DRAFTS in model.manifest.files:
        told += f"; {undrafted(model.default_row)}: the same, stage 1's answer written token by token"
    plain = ""
    if not arguments.without_torch:
        plain = (
            f"; {PLAIN}: the plain pipeline, Hugging Face generate, {model.plain_precision}, nothing kept "
            "between turns or expressions"
        )
    lines = [
        f"compared  {told}{plain}",
        f"examples  {arguments.images} scenes of split {SPLIT!r}, {SIZE}x{SIZE}, two expressions each, "
        f"{arguments.repeats} rounds; first: an image with its first expression; second: one more about it",
    ]
    return [*lines, f"note      {model.note}"] if model.note else lines


if __name__ == "__main__":
    sys.exit(main())
