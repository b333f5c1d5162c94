"""``python benchmarks/engines.py``: TensorRT engines of public models at full size, built without a GPU.

The decoder of a public MLLM and public segmenters, with random weights, are exported and compiled one after
the other, the smallest first, each in a process of its own. A row says how large the engine is, what its
build took, and what the builder's final layer list shows: kernels, attentions that became one kernel, rotary
embeddings, and whether the KV cache is written in place. The engines are thrown away. They are built, not
executed. With ``--save`` every row is written as soon as it is there; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine, results
from benchmarks.drawn import DrawnTensors
from benchmarks.random_bundle import SEGMENTERS
from benchmarks.random_model import MODELS, published_config
from export import engines
from export.engine_layers import Built, cache_is_in_place
from export.formats import FORMATS
from ppcr.errors import CommandParser, EngineError, PPCRError, UsageError, run_cli
from ppcr.manifest import Shapes
from ppcr.pretrained import MAX_LENGTH
from runtime.tensorrt_library import TARGETS

NOTE = (
    "Built, not executed: no GPU takes part. Random weights at published sizes. seconds and peak_memory_mb "
    "are of the process that compiles, graph_seconds of the export before it; kernels and attention_kernels "
    "are counted in the builder's final layer list, a decoder's for the single token and for a block of "
    "tokens; memory includes the mapped files of the weights."
)
DECODER_PRECISIONS = ("int4", "fp16")


@dataclass(frozen=True)
class Wanted:
    """One engine. name: of the model. write: puts the graph into a folder and returns its shapes."""

    name: str
    role: str
    precision: str
    write: Callable[[Path], tuple[Path, Shapes]]

    @property
    def title(self) -> str:
        return f"{self.name} {self.role} {self.precision}"


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    made = CommandParser(description="Build TensorRT engines of public models at full size, and list them.")
    made.add_argument("--target", default="sm_89", choices=TARGETS, help="the GPU (default: %(default)s)")
    made.add_argument(
        "--mllm", default=MODELS[0], choices=MODELS, help="whose decoder (default: %(default)s)"
    )
    made.add_argument(
        "--precision",
        default=",".join(DECODER_PRECISIONS),
        metavar="P[,P]",
        help="of the decoder, of fp16, bf16, int8, int4, or none (default: %(default)s); segmenters: fp16",
    )
    made.add_argument(
        "--segmenters",
        default="mobile-sam,sam-vit-b",
        metavar="S[,S]",
        help=f"of {', '.join(SEGMENTERS)}, or none (default: %(default)s)",
    )
    made.add_argument(
        "--layers", type=int, metavar="N", help="of the decoder, instead of the published number"
    )
    made.add_argument("--work", type=Path, metavar="DIR", help="where graphs lie meanwhile (default: /tmp)")
    results.add_option(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_cli(lambda: _main(parser().parse_args(words), words))


def _main(options: argparse.Namespace, words: Sequence[str]) -> int:
    results.check_name(options.save)
    wanted = list(plan(options))
    library, target = engines.choose(options.target, "fp16")
    described = machine.describe()
    rows: list[dict[str, Any]] = []
    print(
        f"{'engine':<32}{'MB':>9}{'graph s':>9}{'build s':>9}{'peak MB':>9}{'kernels':>12}{'attention':>11}"
    )
    for one in wanted:
        with tempfile.TemporaryDirectory(dir=options.work, prefix="ppcr-engines-") as name:
            try:
                row = measure(one, target, Path(name))
            except PPCRError as error:
                row = {"engine": one.title, "error": str(error)}
        rows.append(row)
        print(line(row), flush=True)
        record = {"note": NOTE, "target": target, "library": library.title, "engines": rows}
        if options.save:
            results.save(options.save, "engines.py", words, described, record)
    print(json.dumps({"benchmark": "engines", "target": target, "library": library.title, "engines": rows}))
    failed = [row["engine"] for row in rows if "error" in row]
    if failed:
        raise EngineError(f"not built: {', '.join(failed)}; the rows say why")
    return 0


def plan(options: argparse.Namespace) -> Iterator[Wanted]:
    """The engines of a command line, the smallest first. Raises UsageError for an unknown name."""
    for name in _names(options.segmenters):
        if name not in SEGMENTERS:
            raise UsageError(f"--segmenters does not know {name!r}: give some of {', '.join(SEGMENTERS)}")
        for role in ("image_encoder", "mask_decoder"):
            yield Wanted(name, role, "fp16", SegmenterGraph(name, role))
    for precision in _names(options.precision):
        if precision not in FORMATS or precision == "fp32":
            raise UsageError(f"--precision takes fp16, bf16, int8 and int4 here, not {precision!r}")
        yield Wanted(
            options.mllm, "decoder", precision, DecoderGraph(options.mllm, precision, options.layers)
        )


def _names(given: str) -> list[str]:
    return [] if given == "none" else list(dict.fromkeys(name.strip() for name in given.split(",")))


def measure(one: Wanted, target: str, folder: Path) -> dict[str, Any]:
    """Export and compile one engine in ``folder``; the row. Raises what either raises."""
    start = time.perf_counter()
    graph, shapes = one.write(folder)
    written = time.perf_counter() - start
    room = shutil.disk_usage(folder).free
    size = sum(path.stat().st_size for path in folder.iterdir())
    if room < size:
        raise EngineError(f"{size / 1e9:.1f} GB for the engine may not fit: give another place with --work")
    job = engines.job_of(graph, folder / "made.engine", one.role, target, one.precision, shapes)
    built = engines.run(job, lambda told: None)
    row: dict[str, Any] = {
        "engine": one.title,
        "bytes": built.bytes,
        "graph_seconds": round(written, 1),
        "seconds": built.seconds,
        "peak_memory_mb": round(built.peak_bytes / 1e6),
        "kernels": [len(built.piece(number)) for number in built.pieces],
        "attention_kernels": [_attentions(built, number) for number in built.pieces],
        "native_layers": built.native,
        "weight_bytes": built.weight_bytes,
        "activation_bytes": built.activation_bytes,
    }
    if one.role == "decoder":
        row |= {"layers": shapes.layers, "cache_in_place": cache_is_in_place(built, shapes.layers)}
    return row


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if "error" in row:
        return f"{row['engine']:<32}not built: {row['error']}"
    counts = (" + ".join(map(str, row[name])) for name in ("kernels", "attention_kernels"))
    kernels, attention = counts
    return (
        f"{row['engine']:<32}{row['bytes'] / 1e6:>9.1f}{row['graph_seconds']:>9.1f}{row['seconds']:>9.1f}"
        f"{row['peak_memory_mb']:>9}{kernels:>12}{attention:>11}"
    )


def _attentions(built: Built, piece: int) -> int:
    return sum(kernel.is_attention for kernel in built.piece(piece))


@dataclass(frozen=True)
class DecoderGraph:
    """Writes the decoder of a public MLLM as a bundle has it."""

    model: str
    precision: str
    layers: int | None

    def __call__(self, folder: Path) -> tuple[Path, Shapes]:
        from export.decoder_graph import write_decoder

        form, path = FORMATS[self.precision], folder / "decoder.onnx"
        config = published_config(self.model, layers=self.layers)
        sizes = write_decoder(
            config, DrawnTensors(), path, dtype=form.dtype, bits=form.decoder_bits, external=True
        )
        shapes = replace(
            _NO_SHAPES,
            max_length=MAX_LENGTH,
            layers=sizes.layers,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            hidden=sizes.hidden,
            vocabulary=sizes.vocabulary,
            deepstack=sizes.deepstack,
        )
        return path, shapes


@dataclass(frozen=True)
class SegmenterGraph:
    """Writes a graph of a public segmenter as a bundle has it."""

    name: str
    role: str

    def __call__(self, folder: Path) -> tuple[Path, Shapes]:
        from export.segmenter_graph import write_image_encoder, write_mask_decoder

        width = published_config(MODELS[0])["hidden_size"]
        segmenter = SEGMENTERS[self.name](width, folder)
        path = folder / f"{self.role}.onnx"
        write = write_image_encoder if self.role == "image_encoder" else write_mask_decoder
        write(segmenter, path)
        return path, replace(_NO_SHAPES, max_text=segmenter.config.max_text)


_NO_SHAPES = Shapes(
    max_length=0, image_tokens=0, grid=(0, 0), patches=0, patch_dim=0, layers=0, kv_heads=0, head_dim=0,
    hidden=0, vocabulary=0, rope_theta=0.0, mrope_section=(), image_size=(0, 0), mask_size=(0, 0),
    max_text=0,
)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
