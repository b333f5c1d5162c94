"""``python runtime/infer.py --image scene.png --expression "…"``: masks, an overlay and a short table.

One expression writes overlay.png, mask_0.png, … and result.json into the output folder; several write them
into its sub-folders 1, 2, … in the order given. The last line is the path of the (last) overlay. With --json
stdout holds the result as JSON and nothing else: one object, or a list of them for several expressions.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ppcr.boxes import parse_box
from ppcr.errors import EXIT_CODES, CommandParser, OutputError, UsageError, one_line, run_cli
from runtime.bundle import AUTO, DEFAULT_BUNDLE, PRECISIONS
from runtime.pipeline import Pipeline, Scene
from runtime.result import EngineFacts, Result
from runtime.session import BACKENDS

_MAX_SHOWN = 100


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    codes = "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())
    made = CommandParser(
        description="Segment what expressions name in an image, with a bundle and without torch.",
        epilog=f"exit codes: {codes}",
    )
    made.add_argument("--image", required=True, metavar="FILE", help="the image to look at")
    made.add_argument(
        "--expression",
        required=True,
        action="append",
        metavar="TEXT",
        help="what to segment; may be repeated",
    )
    made.add_argument(
        "--bundle", type=Path, default=DEFAULT_BUNDLE, metavar="DIR", help="the bundle (default: %(default)s)"
    )
    made.add_argument("--output", metavar="DIR", help="where files go (default: outputs/<name of the image>)")
    made.add_argument("--json", action="store_true", help="print the result as JSON instead of the table")
    made.add_argument(
        "--box",
        action="append",
        metavar="X1,Y1,X2,Y2",
        help="a box in pixels of the image, instead of stage 2; may be repeated",
    )
    made.add_argument(
        "--semantic",
        metavar="TEXT",
        help="'category; attributes; relation; count', instead of stage 1",
    )
    made.add_argument("--precision", choices=PRECISIONS, default=AUTO, help="default: what the bundle says")
    made.add_argument(
        "--engine",
        choices=(AUTO, *BACKENDS),
        default=AUTO,
        help="what runs the bundle (default: the fastest that starts on this machine)",
    )
    made.add_argument(
        "--checkpoint", metavar="DIR", help="what the bundle was made from, for engines that read its weights"
    )
    made.add_argument(
        "--no-drafts", action="store_true", help="have stage 1 written word by word (slower, same answer)"
    )
    made.add_argument("--threads", type=int, metavar="N", help="processors to use (default: all)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit code."""
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        return run_cli(lambda: _infer(parser().parse_args(argv)))


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"warning: {one_line(str(message))}", file=sys.stderr, flush=True)


def _infer(arguments: argparse.Namespace) -> int:
    expressions: list[str] = arguments.expression
    if len(expressions) > 1 and (arguments.box or arguments.semantic is not None):
        raise UsageError(
            "--box and --semantic stand for the prompts of one expression: give --expression once"
        )
    if arguments.output == "":
        raise OutputError("the output path is empty; give a folder name")
    output = Path(arguments.output or Path("outputs", Path(arguments.image).stem))
    with Pipeline.load(
        arguments.bundle,
        precision=arguments.precision,
        threads=arguments.threads,
        engine=arguments.engine,
        checkpoint=arguments.checkpoint,
        drafts=not arguments.no_drafts,
    ) as pipeline:
        scene = pipeline.open(arguments.image)
        results = _segment(scene, arguments)
    folders = [output] if len(results) == 1 else [output / str(n) for n in range(1, len(results) + 1)]
    overlays = [result.save(folder) for result, folder in zip(results, folders, strict=True)]
    if arguments.json:
        values = [result.to_json() for result in results]
        print(json.dumps(values[0] if len(values) == 1 else values, indent=2))
        return 0
    for result, overlay in zip(results, overlays, strict=True):
        print(table(result))
        print(overlay)
    return 0


def _segment(scene: Scene, arguments: argparse.Namespace) -> list[Result]:
    height, width = scene.size
    boxes = [parse_box(text, width, height) for text in arguments.box] if arguments.box else None
    if len(arguments.expression) > 1:
        return scene.segment_many(arguments.expression)
    return [scene.segment(arguments.expression[0], semantic=arguments.semantic, boxes=boxes)]


def table(result: Result) -> str:
    """Prompts, boxes with scores, and the time of each stage, as a few lines of text."""
    lines = [f"expression  {_shown(result.expression)}", f"semantic    {_shown(result.semantic.text)}"]
    if result.is_none:
        lines.append("spatial     none: nothing in the image fits")
    for index, (box, score, mask) in enumerate(
        zip(result.boxes, result.scores, result.instances, strict=True)
    ):
        corners = ", ".join(f"{value:.1f}" for value in box)
        lines.append(f"mask {index:<6} box {corners}   score {score:.3f}   {int(mask.sum())} pixels")
    lines.append("stage       wall ms   device ms")
    lines += [
        f"  {name:<9} {1e3 * t.wall:>8.2f} {1e3 * t.device:>11.2f}" for name, t in result.timings.items()
    ]
    costs = result.costs
    guessed = f", {costs.accepted_tokens} of {costs.drafted_tokens} guessed tokens right"
    drafted = guessed if costs.drafted_tokens else ""
    lines.append(
        f"{costs.tokens} tokens in {costs.forward_calls} forward calls{drafted}, "
        f"{costs.reused_tokens} tokens reused; {_engine(result.engine)}"
    )
    passed_over = result.engine["passed_over"]
    assert isinstance(passed_over, list)  # of all the facts the only one that is
    lines += [f"  not {_shown(line)}" for line in passed_over]
    return "\n".join(lines)


def _engine(facts: EngineFacts) -> str:
    verdict = "ungated" if facts["parity"] == "ungated" else f"parity gate {facts['parity']}"
    where = "" if facts["device"] == "cpu" else f" on {facts['device']}"
    return f"{facts['engine']} {facts['precision']}{where}, {verdict}, {facts['threads']} threads"


def _shown(text: str) -> str:
    line = one_line(" ".join(text.split()))
    return line if len(line) <= _MAX_SHOWN else line[:_MAX_SHOWN] + "..."


if __name__ == "__main__":
    sys.exit(main())
