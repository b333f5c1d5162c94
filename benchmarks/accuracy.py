"""``python benchmarks/accuracy.py --split test``: how well a bundle segments scenes it has never seen.

With ``--photos DIR`` the examples are photographs of a folder (`benchmarks.photos`), and with ``--given
spatial`` their true boxes stand for stages 1 and 2: the segmenter by itself. ``--checkpoint DIR`` gives the
row of the torch reference instead of a bundle's; whether that draws the official model's masks is measured
by ``benchmarks/peers.py --official``.

Prints what was evaluated and under which protocol, figures by kind of expression, with --ablate the four ways
to prompt on the same examples, and as last line one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from benchmarks import machine, photos, results
from benchmarks.ablation import BOTH, VARIANTS, best
from benchmarks.examples import SIZE, examples
from benchmarks.systems import Engine, Reference, System
from ppcr.data.graph import SPLITS, Split
from ppcr.errors import CommandParser, UsageError, run_cli
from ppcr.evaluation.metrics import PROTOCOLS, Case, Protocol, Summary, by_kind, compare, stretch, summarise
from runtime.bundle import AUTO, DEFAULT_BUNDLE, PRECISIONS
from runtime.pipeline import Pipeline

# Engines answer with masks that were cut at a logit of 0; protocols that cut elsewhere need the logits.
_PROTOCOLS = [name for name, protocol in PROTOCOLS.items() if protocol.threshold == 0]
_COLUMNS = ("mIoU", "oIoU", "P@0.5", "P@0.7", "P@0.9", "none ok", "none bad")
_HEAD = f"{'':<18}{'n':>6}" + "".join(f"{name:>9}" for name in _COLUMNS)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    made = CommandParser(
        description="Accuracy of a bundle, or of the torch reference, on a split of the scenes."
    )
    made.add_argument(
        "--bundle", type=Path, default=DEFAULT_BUNDLE, metavar="DIR", help="the bundle (default: %(default)s)"
    )
    made.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="evaluate the torch reference of this checkpoint instead",
    )
    made.add_argument("--precision", choices=PRECISIONS, default=AUTO, help="default: what the bundle says")
    made.add_argument("--split", choices=[s for s in SPLITS if s != "train"], default="test")
    made.add_argument("--limit", type=int, default=1000, metavar="N", help="scenes, one expression each")
    made.add_argument("--photos", type=Path, metavar="DIR", help="photographs of a folder instead of scenes")
    made.add_argument(
        "--given", choices=photos.GIVEN, help="with --photos: the true boxes stand for stages 1 and 2"
    )
    made.add_argument("--ablate", action="store_true", help="compare the four ways to prompt as well")
    made.add_argument("--protocol", choices=_PROTOCOLS, default="default", help="how masks are compared")
    made.add_argument("--threads", type=int, metavar="N", help="processors to use (default: all)")
    results.add_option(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_cli(lambda: _accuracy(parser().parse_args(words), words))


def _accuracy(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    results.check_name(arguments.save)
    if arguments.limit < 1:
        raise UsageError(f"--limit must be 1 or more, not {arguments.limit}")
    if arguments.checkpoint is not None and arguments.precision != AUTO:
        raise UsageError("--precision belongs to a bundle: the torch reference runs in fp32")
    if arguments.given is not None and arguments.photos is None:
        raise UsageError("--given belongs to --photos")
    if arguments.ablate and arguments.photos is not None:
        raise UsageError("--ablate compares on scenes: leave out --photos or --ablate")
    protocol = PROTOCOLS[arguments.protocol]
    listed = None if arguments.photos is None else photos.read(arguments.photos)[: arguments.limit]
    system = load(arguments)
    variants = list(VARIANTS) if arguments.ablate else [BOTH]
    split = arguments.split if listed is None else "photos"
    what = f"{arguments.limit} scenes of split {arguments.split!r}, {SIZE}x{SIZE}, one expression each"
    if listed is not None:
        given = "all stages" if arguments.given is None else "the true boxes given"
        what = f"{len(listed)} expressions on photographs, {given}"
    print(f"system    {system.name}")
    print(f"examples  {what}")
    print(f"protocol  {protocol}")
    start = time.perf_counter()
    if listed is None:
        cases = evaluate(system, arguments.split, arguments.limit, variants, protocol)
    else:
        cases = {BOTH: photos.evaluate(system, listed, protocol, given=arguments.given)}
    seconds = time.perf_counter() - start
    figures = {name: summarise(listed, protocol) for name, listed in cases.items()}
    kinds = by_kind(cases[BOTH], protocol)
    rows = [row(kind, one) for kind, one in kinds.items()]
    print("", f"{_HEAD}   (%)", *rows, row("all", figures[BOTH]), sep="\n")
    result: dict[str, Any] = {
        "benchmark": "accuracy",
        "system": system.name,
        "split": split,
        **({} if listed is None else {"given": arguments.given}),
        **figures[BOTH].to_json(),
        "kinds": {kind: brief(one) for kind, one in kinds.items()},
    }
    if arguments.ablate:
        print("", *ablation_table(cases, figures, protocol), sep="\n")
        result["ablation"] = {name: one.to_json() for name, one in figures.items()}
        result["best"] = best(figures)
    print(f"\n{seconds:.1f} s, {'rendering' if listed is None else 'reading'} included")
    if arguments.save is not None:
        results.save(arguments.save, "accuracy.py", words, machine.describe(), result)
    print(json.dumps({**result, "versions": machine.versions()}))
    return 0


def load(arguments: argparse.Namespace) -> System:
    """The system that the options name."""
    if arguments.checkpoint is None:
        # The figures are onnxruntime's, on every machine.
        options = {"precision": arguments.precision, "threads": arguments.threads, "engine": "onnxruntime"}
        return Engine(Pipeline.load(arguments.bundle, **options))
    reference = Reference.load(arguments.checkpoint)
    if arguments.threads is not None:
        import torch

        torch.set_num_threads(arguments.threads)
    return reference


def evaluate(
    system: System, split: Split, limit: int, variants: Sequence[str], protocol: Protocol
) -> dict[str, list[Case]]:
    """One case per scene of ``range(limit)`` for each of the `VARIANTS` named."""
    cases: dict[str, list[Case]] = {name: [] for name in variants}
    scenes = examples(split, range(limit))
    for example in tqdm(scenes, total=limit, desc=split, unit="scene", disable=None, leave=False):
        view, (expression, *_) = system.look(example.image), example.expressions
        truth = stretch(example.truths[0], protocol.side)
        answer = view.answer(expression.text)
        for name in variants:
            said_none, mask = VARIANTS[name].run(view, expression.text, answer)
            drawn = stretch(mask, protocol.side)
            cases[name].append(
                compare(drawn, truth, protocol=protocol, said_none=said_none, kind=expression.kind)
            )
    return cases


def row(name: str, figures: Summary) -> str:
    """One line of the table under `_HEAD`."""
    shares = [figures.miou, figures.oiou, *(figures.precision[x] for x in (0.5, 0.7, 0.9))]
    shown = "".join(f"{100 * share:>9.2f}" for share in shares)
    nones = (figures.none_recall, figures.none_false_rate)
    return f"{name:<18}{figures.n:>6}{shown}" + "".join(
        f"{'-':>9}" if share is None else f"{100 * share:>9.2f}" for share in nones
    )


def brief(figures: Summary) -> dict[str, float | int]:
    """What the last line tells of one kind of expression."""
    return {
        "n": figures.n,
        "miou": round(figures.miou, 5),
        "precision_at_0.5": round(figures.precision[0.5], 5),
    }


def ablation_table(
    cases: dict[str, list[Case]], figures: dict[str, Summary], protocol: Protocol
) -> list[str]:
    """Lines: a row for each variant, the mIoU of expressions with targets beside it, and which is best."""
    lines = ["ablation, same examples", f"{_HEAD}{'mIoU with targets':>19}   (%)"]
    for name, listed in cases.items():
        held = [case for case in listed if case.has_target]
        targets = f"{100 * summarise(held, protocol).miou:>19.2f}" if held else f"{'-':>19}"
        lines.append(row(name, figures[name]) + targets)
    lines += [f"  {name}: {VARIANTS[name].explanation}" for name in cases]
    return [*lines, f"best: {best(figures)}"]


if __name__ == "__main__":
    sys.exit(main())
