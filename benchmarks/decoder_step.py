"""``python benchmarks/decoder_step.py``: exported decoders against transformers in bfloat16, in one run.

A random-weight decoder of a public model's width is exported in each format, and its step of one token is
timed beside that of the stock model, on the same weights and with a cache of the same length. Every row is a
fresh process. ``--mllm DIR`` takes a directory on disk instead; ``benchmarks/random_model.py`` makes one
of full size. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from benchmarks import results
from benchmarks.machine import describe, peak_memory_mb
from benchmarks.random_model import MODELS, write_random
from benchmarks.timing import measure
from benchmarks.workers import environment
from ppcr.errors import CommandParser, EngineError, run_cli

FORMATS = ("fp32", "fp16", "int8", "int4")
TORCH = "transformers bf16"
PREFIX, CACHE = 128, 256


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--job"]:
        print(json.dumps(_job(json.loads(words[1]))))
        return 0
    return run_cli(lambda: _main(words))


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    made = CommandParser(description="Time one decoding step of exported decoders and of transformers.")
    made.add_argument("--model", choices=MODELS, default=MODELS[0], help="default: %(default)s")
    made.add_argument("--layers", type=int, default=2, metavar="N", help="default: %(default)s")
    made.add_argument("--mllm", type=Path, metavar="DIR", help="a model on disk instead, with all its layers")
    made.add_argument("--formats", default="int8,int4", metavar="F[,F]", help="default: %(default)s")
    made.add_argument("--without-torch", action="store_true", help="leave the row of transformers out")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    made.add_argument("--steps", type=int, default=20, metavar="N", help="default: %(default)s")
    made.add_argument("--work", type=Path, metavar="DIR", help="where files go meanwhile (default: /tmp)")
    results.add_option(made)
    return made


def _main(words: Sequence[str]) -> int:
    options = parser().parse_args(words)
    results.check_name(options.save)
    formats = [name.strip() for name in options.formats.split(",")]
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        parser().error(f"{unknown[0]!r} is not one of {', '.join(FORMATS)}")
    with tempfile.TemporaryDirectory(dir=options.work, prefix="ppcr-decoder-") as work:
        folder = options.mllm
        if folder is None:
            folder = Path(work) / "mllm"
            folder.mkdir()
            write_random(options.model, folder, layers=options.layers, vision_depth=1)
        common = {"folder": str(folder), "work": work, "steps": options.steps, "threads": options.threads}
        rows: dict[str, dict[str, Any]] = {}
        for name in formats:
            written = _ask({**common, "kind": "export", "format": name})
            rows[name] = {**written, **_ask({**common, "kind": "engine", "format": name})}
            for path in Path(work).glob(f"{name}.onnx*"):
                path.unlink()
        if not options.without_torch:
            rows[TORCH] = _ask({**common, "kind": "torch"})
    plain = rows.get(TORCH, {}).get("p50_s")
    print(_table(rows, plain))
    ratios = {name: round(plain / row["p50_s"], 2) for name, row in rows.items() if plain and name != TORCH}
    record = {
        "model": str(options.mllm.name) if options.mllm else options.model,
        "layers": rows[formats[0]]["layers"], "rows": rows, "ratios": ratios,
    }  # fmt: skip
    machine = describe()
    if options.save:
        results.save(options.save, "decoder_step.py", words, machine, record)
    print(json.dumps({"benchmark": "decoder_step", **record, "machine": machine}))
    return 0


def _table(rows: dict[str, dict[str, Any]], plain: float | None) -> str:
    lines = [
        f"{'decoder':<20}{'GB':>7}{'export s':>10}{'export MB':>11}{'step ms':>9}{'run MB':>9}{'faster':>8}"
    ]
    for name, row in rows.items():
        size = f"{row['bytes'] / 1e9:.2f}" if "bytes" in row else ""
        seconds = f"{row['export_s']:.1f}" if "export_s" in row else ""
        memory = f"{row['export_peak_mb']:.0f}" if "export_peak_mb" in row else ""
        ratio = f"{plain / row['p50_s']:.1f}x" if plain else ""
        lines.append(
            f"{name:<20}{size:>7}{seconds:>10}{memory:>11}{1e3 * row['p50_s']:>9.2f}{row['peak_mb']:>9.0f}"
            f"{ratio:>8}"
        )
    return "\n".join(lines)


def _ask(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--job", json.dumps(job)]
    run = subprocess.run(command, text=True, capture_output=True, env=environment(job["threads"]))
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or [f"it ended with {run.returncode}"])[-1]
        raise EngineError(f"the job {job['kind']} {job.get('format', '')} failed: {last}")
    answer: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return answer


def _job(job: dict[str, Any]) -> dict[str, Any]:
    kinds: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "export": _export, "engine": _engine, "torch": _torch
    }  # fmt: skip
    return kinds[job["kind"]](job)


def _export(job: dict[str, Any]) -> dict[str, Any]:
    from export.decoder_graph import write_decoder
    from export.formats import FORMATS as KINDS
    from ppcr.tensors import TensorFiles

    folder, path, form = Path(job["folder"]), Path(job["work"], f"{job['format']}.onnx"), KINDS[job["format"]]
    tensors = TensorFiles(folder)
    start = time.perf_counter()
    sizes = write_decoder(
        _config(folder), tensors, path, dtype=form.dtype, bits=form.decoder_bits, external=True
    )
    taken = time.perf_counter() - start
    written = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {
        "layers": sizes.layers, "bytes": written, "export_s": round(taken, 2),
        "export_peak_mb": round(peak_memory_mb(), 1), "largest_shard_mb": round(largest / 2**20, 1),
    }  # fmt: skip


def _engine(job: dict[str, Any]) -> dict[str, Any]:
    import onnxruntime as ort

    from export.decoder_graph import DecoderSizes
    from runtime.onnxruntime_library import open_graph

    sizes = DecoderSizes.from_config(_config(Path(job["folder"])))
    start = time.perf_counter()
    session = open_graph(Path(job["work"], f"{job['format']}.onnx"), job["threads"])
    loaded = time.perf_counter() - start
    kind: Any = np.float16 if job["format"] == "fp16" else np.float32
    rng, half = np.random.default_rng(0), sizes.head_dim // 2
    binding = session.io_binding()
    logits = np.zeros((1, 1, sizes.vocabulary), np.float32)
    feeds = {
        "inputs_embeds": rng.uniform(-0.02, 0.02, (1, 1, sizes.hidden)).astype(kind),
        "rope_cos": np.ones((1, 1, half), kind), "rope_sin": np.zeros((1, 1, half), kind),
        "write_indices": np.array([PREFIX]), "logits_index": np.array([0]),
        "attn_mask": (np.arange(CACHE) <= PREFIX)[None, None, None],
        **{f"deepstack_{i}": np.zeros((1, 1, sizes.hidden), kind) for i in range(sizes.deepstack)},
    }  # fmt: skip
    for name, value in feeds.items():
        binding.bind_cpu_input(name, np.ascontiguousarray(value, value.dtype))
    for layer in range(sizes.layers):
        for cache in "kv":
            rows = rng.standard_normal((1, sizes.kv_heads, CACHE, sizes.head_dim), np.float32).astype(kind)
            held = ort.OrtValue.ortvalue_from_numpy(rows)
            binding.bind_ortvalue_input(f"{cache}_cache_{layer}", held)
            binding.bind_ortvalue_output(f"{cache}_cache_out_{layer}", held)
    binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
    spread = measure(lambda: session.run_with_iobinding(binding), repeats=job["steps"])
    return {**spread.to_json(), "load_s": round(loaded, 2), "peak_mb": round(peak_memory_mb(), 1)}


def _torch(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForImageTextToText, DynamicCache

    torch.set_num_threads(job["threads"])
    start = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(
        job["folder"], dtype=torch.bfloat16, local_files_only=True
    ).eval()
    loaded = time.perf_counter() - start
    table = model.get_input_embeddings().weight
    cache = DynamicCache(config=model.config.text_config)
    places = torch.arange(PREFIX)[None, None].expand(3, 1, -1)
    with torch.inference_mode():
        ids = torch.arange(1000, 1000 + PREFIX)[None]
        model.model.language_model(
            inputs_embeds=table[ids], position_ids=places, past_key_values=cache, use_cache=True
        )

        def step() -> None:
            # The decoder and its head alone, each time at the same length of cache.
            cache.crop(PREFIX - cache.get_seq_length())
            hidden = model.model.language_model(
                inputs_embeds=table[ids[:, :1]], position_ids=places[..., :1] + PREFIX,
                past_key_values=cache, use_cache=True,
            ).last_hidden_state  # fmt: skip
            model.lm_head(hidden[:, -1:])

        spread = measure(step, repeats=job["steps"])
    return {**spread.to_json(), "load_s": round(loaded, 2), "peak_mb": round(peak_memory_mb(), 1)}


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


if __name__ == "__main__":
    raise SystemExit(main())
