"""``python benchmarks/random_model.py --model NAME --output DIR``: a public model's sizes, random weights.

Config and bfloat16 safetensors as the hub has them, in shards of a gigabyte, written piece by piece. What
export and engines cost does not depend on what the weights say.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import ml_dtypes
import numpy as np

from ppcr.errors import CommandParser, run_cli
from ppcr.files import atomic_directory

SHARD_BYTES = 1 << 30
_PIECE = 16 << 20
_QWEN3_TOWERS = {
    "small": {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096},
    "large": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304},
}
# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
_QWEN2_5 = {
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
}
_QWEN3 = {
    "2B": (2048, 6144, 28, 16, 8, 151936, True),
    "4B": (2560, 9728, 36, 32, 8, 151936, True),
    "8B": (4096, 12288, 36, 32, 8, 151936, False),
}
MODELS = tuple(f"qwen2_5_vl-{size}" for size in _QWEN2_5) + tuple(f"qwen3_vl-{size}" for size in _QWEN3)


def published_config(
    name: str, *, layers: int | None = None, vision_depth: int | None = None
) -> dict[str, Any]:
    """config.json of a published model, with fewer layers where that is asked for."""
    family, _, size = name.partition("-")
    row = (_QWEN2_5 if family == "qwen2_5_vl" else _QWEN3)[size]
    hidden, intermediate, depth, heads, kv_heads, vocabulary, tied = row
    text: dict[str, Any] = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers or depth,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 128000,
        "bos_token_id": 151643, "eos_token_id": 151645,
    }  # fmt: skip
    vision: dict[str, Any] = {
        "num_heads": 16, "out_hidden_size": hidden, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    top: dict[str, Any] = {
        "model_type": family, "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
        "image_token_id": 151655, "video_token_id": 151656,
        "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    }  # fmt: skip
    if family == "qwen2_5_vl":
        top["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
        vision |= {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "patch_size": 14,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "hidden_act": "silu",
        }  # fmt: skip
        text |= {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
        config = {**top, **text}
    else:
        top["architectures"] = ["Qwen3VLForConditionalGeneration"]
        vision |= _QWEN3_TOWERS["large" if size == "8B" else "small"]
        levels = [8, 16, 24] if size == "8B" else [5, 11, 17]
        vision |= {
            "patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": levels,
            "hidden_act": "gelu_pytorch_tanh",
        }  # fmt: skip
        rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
        text |= {"head_dim": 128, "rope_theta": 5e6, "rope_scaling": rope}
        config = {**top, "text_config": text}
    if vision_depth is not None:
        vision["depth"] = vision_depth
    return {**config, "vision_config": vision}


def write_random(
    name: str, folder: Path, *, seed: int = 0, layers: int | None = None, vision_depth: int | None = None
) -> dict[str, Any]:
    """Fill the empty ``folder`` with a configuration, which is returned, and random weights."""
    config = published_config(name, layers=layers, vision_depth=vision_depth)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    shapes, rng = _shapes(folder), np.random.default_rng(seed)
    shards = list(_shards(shapes))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        index |= dict.fromkeys(names, file)
        _write_shard(folder / file, {key: shapes[key] for key in names}, rng)
    whole = {"metadata": {"total_size": sum(2 * math.prod(shape) for shape in shapes.values())}}
    (folder / "model.safetensors.index.json").write_text(json.dumps({**whole, "weight_map": index}))
    return config


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the model that ``folder/config.json`` describes."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def _shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    names, held = list[str](), 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if names and held + size > SHARD_BYTES:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    with path.open("xb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for name, shape in shapes.items():
            for values in _values(name, math.prod(shape), rng):
                file.write(values.astype(ml_dtypes.bfloat16).tobytes())


def _values(name: str, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    norm = name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight"))
    for start in range(0, count, _PIECE):
        size = min(_PIECE, count - start)
        noise = 0.02 * rng.standard_normal(size, np.float32)
        yield 1 + noise if norm or "layernorm" in name else noise


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_cli(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = CommandParser(description="Write a directory of a public model's sizes with random weights.")
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--layers", type=int, metavar="N", help="of the decoder (default: as published)")
    parser.add_argument("--vision-depth", type=int, metavar="N", help="default: as published")
    options: argparse.Namespace = parser.parse_args(argv)
    with atomic_directory(options.output, marker="config.json") as part:
        write_random(options.model, part, layers=options.layers, vision_depth=options.vision_depth)
    size = sum(path.stat().st_size for path in options.output.iterdir())
    print(f"{options.output}: {size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
