"""Set how readily the prompt MLLM says "none": ``python -m ppcr.training.calibrate --mllm … --output …``.

Training leaves the threshold between "none" and a number where the cross-entropy is least. What users are
promised is a share of false "none": the embedding row of that word is moved along the mean hidden state of
the positions that decide, until the share on validation scenes is the one asked for. Nothing else changes.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from ppcr.data.expressions import sample_expressions
from ppcr.data.graph import sample_scene
from ppcr.errors import run_cli
from ppcr.model.checkpoint import load_mllm, save_mllm
from ppcr.model.mllm import TinyMLLM, text_hidden, vision_features
from ppcr.model.slot_attention import SLOTS
from ppcr.tokenizer import PromptTokenizer
from ppcr.training.mllm_data import OBJECTS, draw
from ppcr.training.packing import Packer, stack

_BATCH = 16


@torch.no_grad()
def deciding_states(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: PromptTokenizer, scenes: int
) -> tuple[Tensor, Tensor]:
    """Hidden states f32 [M, hidden] that decide the count on validation scenes, and the true counts [M]."""
    size, language = TinyMLLM(), model.model.language_model
    packer = Packer(tokenizer, grid=size.grid, objects=OBJECTS)
    attention, language.config._attn_implementation = language.config._attn_implementation, SLOTS
    states, counts = [], []
    for first in range(0, scenes, _BATCH):
        graphs = [sample_scene("val", index) for index in range(first, first + _BATCH)]
        rng = np.random.default_rng((11, first))
        packs = [packer.pack(g, sample_expressions(g, packer.conversations, rng)) for g in graphs]
        batch = {name: torch.from_numpy(value) for name, value in stack(packs).items()}
        patches = draw(graphs, size.image_size, size.patch, size.merge, "cpu").patches
        embeddings = language.embed_tokens(batch["ids"])
        images = (batch["ids"] == tokenizer.image_token)[..., None]
        embeddings = embeddings.masked_scatter(images, vision_features(model, patches, size.grid))
        hidden, _ = text_hidden(language, embeddings, batch["positions"].transpose(0, 1), packer.layout)
        rows = batch["weight"] > 1
        states.append(hidden[rows])
        scene = torch.nonzero(rows)[:, 0]
        counts.append(batch["wanted"][scene, batch["pointing"][rows], 0].sum(-1))
    language.config._attn_implementation = attention
    return torch.cat(states), torch.cat(counts)


def shift_for(margins: Tensor, counts: Tensor, false_none: float) -> float:
    """What to add to the margins [M] of "none" over the numbers for that share of false "none"."""
    return -float(torch.quantile(margins[counts > 0], 1.0 - false_none))


@torch.no_grad()
def calibrate(
    model: Qwen2_5_VLForConditionalGeneration,
    tokenizer: PromptTokenizer,
    *,
    false_none: float = 0.02,
    scenes: int = 480,
) -> dict[str, float]:
    """Move the row of "none" in place; returns shares before and after on the scenes it was moved on."""
    states, counts = deciding_states(model, tokenizer, scenes)
    table = model.model.language_model.embed_tokens.weight
    none, *numbers = tokenizer.count_tokens

    def margins() -> Tensor:
        return states @ table[none] - (states @ table[numbers].T).amax(-1)

    def shares(name: str) -> dict[str, float]:
        said = margins() > 0
        return {
            f"{name}_found": float(said[counts == 0].float().mean()),
            f"{name}_false": float(said[counts > 0].float().mean()),
        }

    before, mean = shares("before"), states.mean(0)
    # Along the mean, the step per state is nearly the same; a few rounds settle what is not.
    for _ in range(8):
        table[none] += shift_for(margins(), counts, false_none) / mean.square().sum() * mean
    return before | shares("after")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m ppcr.training.calibrate``; returns the exit code."""
    return run_cli(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="ppcr.training.calibrate", description=__doc__)
    parser.add_argument("--mllm", type=Path, required=True, help="folder of the trained MLLM")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--false-none", type=float, default=0.02, help="share of targets answered with none")
    parser.add_argument("--scenes", type=int, default=480)
    options = parser.parse_args(argv)
    model = load_mllm(options.mllm)
    tokenizer = PromptTokenizer.load(options.mllm / "tokenizer.json")
    found = calibrate(model, tokenizer, false_none=options.false_none, scenes=options.scenes)
    print(" ".join(f"{name} {value:.4f}" for name, value in found.items()))
    shutil.copytree(options.mllm, options.output, dirs_exist_ok=True)
    save_mllm(model, options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
