"""A TensorRT-LLM package in a bundle: ``python export/tensorrt_llm_package.py [--output DIR]``.

Writes ``tensorrt_llm/`` into the bundle: ``model/``, the checkpoint's own Hugging Face directory with the
image processor that cuts images as this project does; ``llm_args.yaml``, the arguments of the LLM API; and
README.md with the command that serves it. From 1.3 TensorRT-LLM has no engine files: it loads that directory.

``--quantize fp8`` has ModelOpt quantise the text model. ``--engine-checkpoint`` adds ``engine_checkpoint/``
for the engines of 1.2 and older. Exit codes: `ppcr.errors`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from export.extend import held_files, link_files
from export.model_optimizer import (
    CALIBRATION_SCENES,
    FORMATS,
    load_model_optimizer,
    quantize_directory,
    require_format,
)
from export.tensorrt_llm_checkpoint import BUILD, require_engine_path, write_engine_checkpoint
from ppcr.checkpoint import SHIPPED, Checkpoint
from ppcr.config import MLLMConfig
from ppcr.errors import BundleError, CheckpointError, CommandParser, run_cli
from ppcr.files import atomic_directory, read_json, write_json, write_text
from ppcr.manifest import MANIFEST, REBUILD, Manifest, files_below
from ppcr.prompts import IMAGE_PAD, VISION_END, VISION_START
from runtime.bundle import DEFAULT_BUNDLE

FOLDER = "tensorrt_llm"
ENGINE_FOLDER = "engine_checkpoint"
_TOKENIZER_CONFIG = "tokenizer_config.json"
Progress = Callable[[str], None]
SERVE = "trtllm-serve {model} --backend pytorch --extra_llm_api_options {arguments}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_cli(lambda: _main(argv))


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    made = CommandParser(description="Write a TensorRT-LLM package of a checkpoint into its bundle.")
    made.add_argument(
        "--checkpoint", type=Path, default=SHIPPED, metavar="DIR", help="default: the shipped ppcr-tiny"
    )
    made.add_argument(
        "--output", type=Path, default=DEFAULT_BUNDLE, metavar="DIR", help="the bundle (default: %(default)s)"
    )
    made.add_argument(
        "--quantize",
        metavar="FORMAT",
        help=f"have ModelOpt quantise the text model: {' or '.join(FORMATS)} (default: weights as they are)",
    )
    made.add_argument(
        "--engine-checkpoint",
        action="store_true",
        help="add the text model in the form that engines of TensorRT-LLM 1.2 and older are built from",
    )
    return made


def _main(argv: Sequence[str] | None) -> int:
    from tqdm import tqdm

    options = parser().parse_args(argv)
    checkpoint = Checkpoint.open(options.checkpoint)
    # What can be refused is refused before anything is written.
    if options.quantize is not None:
        require_format(options.quantize, checkpoint)
        load_model_optimizer()
    if options.engine_checkpoint:
        require_engine_path(checkpoint)
    # ModelOpt answers the scenes at least twice to find the scales of int4: no total is known.
    with tqdm(unit="scene", file=sys.stderr, disable=None if options.quantize else True) as bar:
        add_package(
            checkpoint,
            options.output,
            quantize=options.quantize,
            engine_checkpoint=options.engine_checkpoint,
            progress=lambda name: bar.update(),
        )
    print(f"TensorRT-LLM package: {options.output / FOLDER} (written, not executed)")
    return 0


def add_package(
    checkpoint: Checkpoint,
    bundle: Path,
    *,
    quantize: str | None = None,
    engine_checkpoint: bool = False,
    progress: Progress | None = None,
) -> None:
    """Put the package of ``checkpoint`` into the ``bundle`` that was built from it.

    Raises:
        BundleError: no bundle, changed files, or one of another checkpoint.
        CheckpointError: its tokenizer_config.json cannot be read.
        UsageError, EngineError: it cannot be quantised (`export.model_optimizer`), or the engine path of
            TensorRT-LLM does not have it.
    """
    manifest = Manifest.load(bundle)
    manifest.verify(bundle)
    if manifest.source != checkpoint.source_hash():
        raise BundleError(f"{bundle} was built from another checkpoint than {checkpoint.root}: {REBUILD}")
    with atomic_directory(bundle, marker=MANIFEST) as part:
        link_files(bundle, part)
        shutil.rmtree(part / FOLDER, ignore_errors=True)
        write_package(
            checkpoint,
            part / FOLDER,
            quantize=quantize,
            engine_checkpoint=engine_checkpoint,
            progress=progress,
        )
        written = {name for name in files_below(part) if name.startswith(f"{FOLDER}/")}
        dataclasses.replace(manifest, files=held_files(part, manifest, written)).save(part)


def write_package(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    quantize: str | None = None,
    engine_checkpoint: bool = False,
    scenes: int = CALIBRATION_SCENES,
    progress: Progress | None = None,
) -> None:
    """Write the package into the new directory ``folder``; see `add_package`."""
    model, config = folder / "model", checkpoint.config.mllm
    shutil.copytree(checkpoint.mllm, model)
    if quantize is not None:
        quantize_directory(checkpoint, model, quantize, scenes=scenes, progress=progress)
    if engine_checkpoint:
        write_engine_checkpoint(checkpoint, folder / ENGINE_FOLDER)
    tokenizer = read_json(model / _TOKENIZER_CONFIG, CheckpointError)
    write_json(model / _TOKENIZER_CONFIG, with_template(tokenizer))
    write_json(model / "preprocessor_config.json", image_processor(config))
    write_text(folder / "llm_args.yaml", yaml(llm_arguments(config)))
    command = SERVE.format(model="model", arguments="llm_args.yaml")
    told = _README.format(command=command)
    if quantize is not None:
        told += f"\nThe weights of the text model are {quantize}, quantised by NVIDIA's ModelOpt.\n"
    if engine_checkpoint:
        tokens = config.image_tokens
        told += _ENGINES.format(build=BUILD.format(length=config.max_length, features=tokens))
    write_text(folder / "README.md", told)


def image_processor(config: MLLMConfig) -> dict[str, Any]:
    """preprocessor_config.json: images come at the one size there is, and are cut as in `ppcr.images`."""
    pixels = config.image_size[0] * config.image_size[1]
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
        "min_pixels": pixels,
        "max_pixels": pixels,
        "patch_size": config.patch,
        "merge_size": config.merge,
        "temporal_patch_size": config.temporal,
        "resample": 3,
    }


def llm_arguments(config: MLLMConfig) -> dict[str, Any]:
    """Arguments of the LLM API: block reuse across the turns, the step as a CUDA graph, guided decoding."""
    return {
        "guided_decoding_backend": "xgrammar",
        "max_seq_len": config.max_length,
        "kv_cache_config": {"enable_block_reuse": True, "enable_partial_reuse": True},
        "cuda_graph_config": {"max_batch_size": 8, "enable_padding": True},
    }


def with_template(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json whose chat template undoes the line break the server puts behind an image."""
    shown = f"{VISION_START}{IMAGE_PAD}{VISION_END}"
    before = "message.content is string %}{{ message.content }}"
    after = f"message.content is string %}}{{{{ message.content | replace('{shown}\\n', '{shown}') }}}}"
    template = tokenizer.get("chat_template")
    if not isinstance(template, str) or before not in template:
        raise CheckpointError(f"{_TOKENIZER_CONFIG} of the checkpoint has no chat template of this project")
    return {**tokenizer, "chat_template": template.replace(before, after)}


def yaml(values: dict[str, Any], indent: int = 0) -> str:
    """Nested names and JSON scalars as YAML."""
    lines = []
    for name, value in values.items():
        head = f"{' ' * indent}{name}:"
        lines.append(
            f"{head}\n{yaml(value, indent + 2)}"
            if isinstance(value, dict)
            else f"{head} {json.dumps(value)}\n"
        )
    return "".join(lines)


_README = """# TensorRT-LLM package

`model/` is a Hugging Face Qwen2.5-VL directory, `llm_args.yaml` holds the arguments of the LLM API.

    {command}

serves it; `PPCR_TENSORRT_LLM_URL=http://localhost:8000` then has the runtime ask that server. Without the
variable the runtime loads `model/` itself, where tensorrt_llm is installed. Written against the sources of
TensorRT-LLM 1.2.0, but not executed.
"""
_ENGINES = """
`engine_checkpoint/` is the text model for the engine path, which 1.2 is the last release to have:

    {build}

compiles it. Image features come from the bundle's vision graph, through the prompt table. Not executed.
"""


if __name__ == "__main__":
    raise SystemExit(main())
