"""Checkpoint to bundle: ``python export/build_engines.py [--checkpoint DIR] [--output DIR] [--precision …]``.

Writes the graphs at every precision, then holds each to the torch reference on held-out scenes. The bundle is
built beside its place and renamed into it: an error, or Ctrl-C, leaves nothing. Exit codes: `ppcr.errors`.

With ``--target sm_89`` the bundle (built first where there is none) gets TensorRT engines for that GPU. With
``--check-engine openvino`` an engine of the runtime is held to the gate, and the manifest gets its figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ppcr.boxes import WRITTEN
from ppcr.checkpoint import SHIPPED, Checkpoint
from ppcr.errors import BundleError, CommandParser, ParityError, UsageError, run_cli
from ppcr.files import atomic_directory
from ppcr.manifest import MANIFEST, Manifest, Parity
from runtime.attention_plugin import OPTION
from runtime.bundle import AUTO, DEFAULT_BUNDLE
from runtime.session import BACKENDS
from runtime.tensorrt_library import CURRENT, TARGETS

if TYPE_CHECKING:
    from tqdm import tqdm

    from export.bundle import BundleWriter
    from export.engine_layers import Built
    from export.parity import Progress

PRECISIONS = ("fp32", "int8")
PRETRAINED_PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
PRETRAINED_DEFAULT = ("int4", "int8")
PARITY_SCENES, PRETRAINED_SCENES = 128, 2
_ENGINE_PRECISIONS = ("fp16", "bf16", "fp8", "int8", "int4")


_HELP = {
    "version-compatible": "engines that later versions of the library load (tensorrt alone)",
    "strip-weights": "engines without weights, for programs that put them in; needs a GPU, and the runtime "
    "here does not load them",
    "weight-streaming": "engines that keep as many weights on the GPU as fit when they are loaded, and the "
    "rest in the host's memory",
    OPTION: "engines whose attention between prompts and image runs the kernels of this project",
}
_EPILOG = (
    "With --target: tensorrt_rtx builds for sm_80, sm_86, sm_89 and sm_120 on any machine, tensorrt for the "
    "GPU it runs on (--target current). fp16 and bf16 are types of everything; int8 and int4 of the "
    "decoder's weights, beside fp16; fp8 of all matrix products, by scales measured on 16 scenes, from sm_89 "
    "on. tensorrt keeps its timings in engines/TARGET/timings.cache for the next build, tensorrt_rtx the "
    "kernels that it finishes at the first load beside each engine. Ctrl-C leaves the bundle as it was."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_cli(lambda: _main(argv))


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    summary = "Export a checkpoint to a bundle that runs without torch, held to the parity gate."
    out = CommandParser(description=summary, epilog=_EPILOG)
    shipped = "default: the shipped ppcr-tiny"
    out.add_argument("--checkpoint", type=Path, default=SHIPPED, metavar="DIR", help=shipped)
    output = "default: %(default)s"
    out.add_argument("--output", type=Path, default=DEFAULT_BUNDLE, metavar="DIR", help=output)
    out.add_argument(
        "--precision",
        type=_precisions,
        metavar="P[,P]",
        help=f"of {', '.join(PRECISIONS)}, and around a public MLLM of {', '.join(PRETRAINED_PRECISIONS)}; "
        f"the first is the bundle's default (default: {', '.join(PRECISIONS)}, or there "
        f"{', '.join(PRETRAINED_DEFAULT)}); with --target one of {', '.join(_ENGINE_PRECISIONS)} "
        f"(default: fp16)",
    )
    out.add_argument(
        "--target",
        choices=(CURRENT, *TARGETS),
        help="compile the bundle's graphs to TensorRT engines for this GPU",
    )
    for option in _HELP:
        out.add_argument(f"--{option}", action="store_true", help=f"with --target: {_HELP[option]}")
    out.add_argument(
        "--check-engine",
        choices=tuple(BACKENDS),
        help="hold this engine, with the bundle that is there, to the parity gate at one --precision "
        "(default: what the engine would take), and write its figures into the manifest",
    )
    out.add_argument(
        "--parity-scenes",
        type=_positive,
        metavar="N",
        help="held-out scenes of the parity gate, which reads the MLLM into memory in fp32 "
        f"(default: {PARITY_SCENES}; around a public MLLM {PRETRAINED_SCENES})",
    )
    out.add_argument(
        "--no-parity",
        action="store_true",
        help="leave the parity gate out; the bundle's manifest will hold no figures",
    )
    out.add_argument(
        "--allow-parity-failure",
        action="store_true",
        help="write the bundle even where it disagrees with the reference; its manifest will say so",
    )
    out.add_argument("--force", action="store_true", help="build even if the bundle is up to date")
    return out


def _main(argv: Sequence[str] | None) -> int:
    options = parser().parse_args(argv)
    if options.target:
        return _engines(options)
    chosen = [option for option in _HELP if getattr(options, option.replace("-", "_"))]
    if chosen:
        raise UsageError(f"--{chosen[0]} goes with --target (--help shows the options)")
    if options.check_engine:
        return _check_engine(options)
    return _bundle(options)


def _bundle(options: argparse.Namespace) -> int:
    checkpoint = Checkpoint.open(options.checkpoint)
    settle(options, checkpoint)
    if not options.force and is_current(options.output, checkpoint, options):
        print(f"{options.output} is up to date with {checkpoint.root} (--force builds it again)")
        return 0
    with atomic_directory(options.output, marker=MANIFEST) as part:
        build(checkpoint, part, options)
    print(f"bundle: {options.output}")
    return 0


def _engines(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from export.engines import add_engines, choose, formats_for

    names = options.precision or ("fp16",)
    if len(names) > 1:
        raise UsageError("engines are built at one precision a time: give --precision one name")
    extras = [option for option in _HELP if getattr(options, option.replace("-", "_"))]
    library, target = choose(options.target, names[0], extras)
    if not (options.output / MANIFEST).is_file():
        public = Checkpoint.open(options.checkpoint).config.box_convention in WRITTEN
        options.precision = formats_for(names[0]) if public else None
        _bundle(options)
    roles = Manifest.load(options.output).engine_roles
    with tqdm(total=len(roles), unit="engine", file=sys.stderr, disable=None) as bar:

        def progress(told: str) -> None:
            if told in roles:
                bar.update()
            else:
                bar.set_description_str(told)

        built = add_engines(options.output, target, names[0], options=extras, progress=progress)
    print(engine_table(built))
    print(f"engines: {options.output / 'engines' / target} ({library.title}; built, not executed)")
    return 0


def _check_engine(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from export.engine_parity import check_engine
    from export.parity import shortfall

    names = options.precision or (AUTO,)
    if len(names) > 1:
        raise UsageError("an engine is checked at one precision a time: give --precision one name")
    pretrained = Checkpoint.open(options.checkpoint).config.box_convention in WRITTEN
    scenes = options.parity_scenes or (PRETRAINED_SCENES if pretrained else PARITY_SCENES)
    with tqdm(total=2 * scenes, unit="scene", file=sys.stderr, disable=None) as bar:

        def progress(name: str) -> None:
            bar.set_description_str(name)
            bar.update()

        key, parity = check_engine(
            options.output, options.checkpoint, options.check_engine, names[0], scenes, progress
        )
    print("\n".join(parity_table({key: parity})))
    print(f"in the manifest: {options.output / MANIFEST}")
    if not parity.passed:
        told = shortfall(parity, key.split()[-1])
        raise ParityError(f"{key} disagrees with the torch reference, auto passes it over: {told}")
    return 0


def engine_table(built: dict[str, Built]) -> str:
    """Size, kernels, attentions fused to one kernel, and native layers of each engine, a line each.

    A decoder has two numbers of kernels: of a single token, and of a block of any length.
    """
    lines = [f"{'engine':<16}{'MB':>8}{'kernels':>10}{'attention':>11}  native layers"]
    for role, engine in built.items():
        pieces = [engine.piece(number) for number in engine.pieces]
        kernels = " + ".join(str(len(piece)) for piece in pieces)
        attention = " + ".join(str(sum(kernel.is_attention for kernel in piece)) for piece in pieces)
        native = ", ".join(f"{name} {count}" for name, count in engine.native.items())
        lines.append(f"{role:<16}{engine.bytes / 1e6:>8.2f}{kernels:>10}{attention:>11}  {native or '-'}")
    return "\n".join(lines)


def settle(options: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Fill in the defaults that depend on the checkpoint. Raises UsageError for an impossible precision."""
    pretrained = checkpoint.config.box_convention in WRITTEN
    allowed = PRETRAINED_PRECISIONS if pretrained else PRECISIONS
    if options.precision is None:
        options.precision = PRETRAINED_DEFAULT if pretrained else PRECISIONS
    for name in options.precision:
        if name not in allowed:
            told = f"this checkpoint is exported as {', '.join(allowed)}, not as {name}"
            raise UsageError(f"{told} (--help shows the options)")
    if options.parity_scenes is None:
        options.parity_scenes = PRETRAINED_SCENES if pretrained else PARITY_SCENES
    if options.no_parity:
        options.parity_scenes = 0


def is_current(output: Path, checkpoint: Checkpoint, options: argparse.Namespace) -> bool:
    """Whether ``output`` holds what these options would build, by the same tools, whole and unchanged."""
    if not (output / MANIFEST).is_file():
        return False
    from export.bundle import tools

    try:
        manifest = Manifest.load(output)
        manifest.verify(output)
    except BundleError:
        return False
    # Figures of other engines came later, and say nothing of the graphs.
    built = {name: parity for name, parity in manifest.parity.items() if name in manifest.precisions}
    return (
        manifest.source == checkpoint.source_hash()
        and tuple(manifest.precisions) == options.precision
        and manifest.tools == tools()
        and all(parity.scenes >= options.parity_scenes for parity in built.values())
        and (options.allow_parity_failure or all(parity.passed for parity in built.values()))
    )


def build(checkpoint: Checkpoint, part: Path, options: argparse.Namespace) -> None:
    """Fill the empty directory ``part`` and hold it to the gate.

    Raises:
        CheckpointError, OutputError: the inputs or the place are at fault.
        ParityError: under the gate, and that was not allowed.
    """
    from tqdm import tqdm

    from export.parity import require
    from export.pretrained_bundle import bundle_writer

    steps = options.parity_scenes * (1 + len(options.precision))
    with tqdm(total=steps, unit="step", file=sys.stderr, disable=None) as bar:

        def progress(name: str) -> None:
            bar.set_description_str(name)
            bar.update()

        writer = bundle_writer(checkpoint, part, progress)
        bar.total += writer.steps(options.precision)
        shapes = writer.write_graphs(options.precision)
        writer.write_common()
        manifest = writer.manifest(options.precision, shapes)
        manifest.save(part)
        figures = {} if options.no_parity else _parity(checkpoint, part, options, bar, progress)
    print(table(writer, manifest, figures))
    # An engine that failed is passed over; the graphs themselves must pass.
    own = {name: parity for name, parity in figures.items() if name in options.precision}
    if not options.allow_parity_failure:
        require(own)
    failed = not all(parity.passed for parity in own.values())
    writer.manifest(options.precision, shapes, parity=figures, allowed=failed).save(part)


def _parity(
    checkpoint: Checkpoint, part: Path, options: argparse.Namespace, bar: tqdm[Any], progress: Progress
) -> dict[str, Parity]:
    """Figures of the graphs at each precision, and of the faster engines that this machine has."""
    from transformers.utils import logging as transformers_logging

    from export.engine_parity import faster_here, measure_faster
    from export.formats import NOT_ON_CPU
    from export.parity import Cases, measure
    from ppcr.model.reference import ReferencePipeline

    transformers_logging.disable_progress_bar()
    reference = ReferencePipeline.load(checkpoint)
    cases = Cases(reference, options.parity_scenes, progress)
    runnable = [precision for precision in options.precision if precision not in NOT_ON_CPU]
    figures = {precision: measure(part, precision, cases, progress) for precision in runnable}
    bar.total += cases.count * len(faster_here(Manifest.load(part)))
    return {**figures, **measure_faster(part, cases, progress)}


def table(writer: BundleWriter, manifest: Manifest, figures: dict[str, Parity]) -> str:
    """Sizes and times of the graphs, then the gate's figures, a line each."""
    lines = [f"{'file':<36}{'MB':>8}{'s':>8}"]
    for name, entry in manifest.files.items():
        seconds = f"{writer.seconds[name]:.1f}" if name in writer.seconds else ""
        lines.append(f"{name:<36}{entry.bytes / 1e6:>8.2f}{seconds:>8}")
    lines.append("")
    return "\n".join([*lines, *parity_table(figures)])


def parity_table(figures: dict[str, Parity]) -> list[str]:
    """The gate's figures by precision, or by engine and precision, a line each."""
    width = max(12, *(len(name) + 2 for name in figures)) if figures else 12
    lines = [f"{'parity':<{width}}{'scenes':>8}{'tokens':>10}{'mean IoU':>10}{'worst IoU':>11}  gate"]
    for name, p in figures.items():
        verdict = "passed" if p.passed else "FAILED"
        share = f"{p.identical_tokens:.1%}"
        row = f"{name:<{width}}{p.scenes:>8}{share:>10}{p.mean_iou:>10.4f}{p.worst_iou:>11.4f}  {verdict}"
        lines.append(row)
    return lines


def _precisions(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    known = (*PRETRAINED_PRECISIONS, *_ENGINE_PRECISIONS)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(dict.fromkeys(known))}")
    return names


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return number


if __name__ == "__main__":
    raise SystemExit(main())
