"""Train the prompt MLLM from nothing: ``python -m ppcr.training.mllm --output runs/mllm --minutes 15``.

The run is a budget of minutes. It first only looks (the vision tower learns to name and place every object of
an image), then learns both stages of the conversation while expressions grow harder: attributes, one-hop
relations, everything. Scenes are rendered on the training device. A killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from ppcr.data.expressions import sample_expressions
from ppcr.data.graph import sample_scene
from ppcr.errors import run_cli
from ppcr.model.checkpoint import save_mllm
from ppcr.model.mllm import TinyMLLM, build_mllm
from ppcr.model.tokenizer import save_tokenizer, train_tokenizer
from ppcr.prompts import SemanticPrompt
from ppcr.tokenizer import PromptTokenizer
from ppcr.training.common import (
    Budget,
    Ema,
    LossLog,
    StopSignal,
    autocast,
    cosine,
    load_resume,
    pick_device,
    save_resume,
    set_lr,
)
from ppcr.training.mllm_data import OBJECTS, Conversations
from ppcr.training.mllm_step import LOOK_SHARE, SHARES, Trainer, optimizers, to_device
from ppcr.training.packing import IGNORE, Packer

CUDA_BATCH, CUDA_WORKERS = 64, 8


@dataclass(frozen=True)
class Recipe:
    """One training run; command-line defaults come from here."""

    minutes: float = 15.0
    batch: int = 12
    muon_lr: float = 3e-3
    adam_lr: float = 1.5e-3
    weight_decay: float = 0.02
    ema: float = 0.998
    look_until: float = 0.05
    level_1_at: float = 0.15
    level_2_at: float = 0.30
    # Then as many of each kind as are asked for, so that "none" is said as often as it is true.
    level_3_at: float = 0.85
    # The tower sees what it will by then, and a third of the time of a step goes into teaching it.
    freeze_vision_at: float = 0.9
    # After how many layers of the language model should be known: landmarks and candidates, what stands so to
    # the landmarks, the targets.
    taps: tuple[int, int, int] = (2, 4, 5)
    # One kernel for what lies between products; a third of the time of a step on a CPU.
    compile: bool = False
    seed: int = 0


def corpus(scenes: int = 4000, *, seed: int = 0) -> list[str]:
    """Expressions and semantic prompts of training scenes, for the tokenizer."""
    lines = []
    for index in range(scenes):
        rng = np.random.default_rng((seed, index))
        for expression in sample_expressions(sample_scene("train", index), 4, rng, 2):
            lines += [expression.text, expression.semantic.text]
    return lines


def level_at(progress: float, recipe: Recipe) -> int:
    """Grammar level by progress (see ``Conversations``); -1 while only looking."""
    steps = (recipe.look_until, recipe.level_1_at, recipe.level_2_at, recipe.level_3_at)
    return sum(progress >= step for step in steps) - 1


def train(recipe: Recipe, output: Path, *, device: torch.device, workers: int) -> Path:
    """Train until the budget is spent or a stop signal comes. Returns the MLLM's directory."""
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "mllm" / "tokenizer.json").exists():
        save_tokenizer(train_tokenizer(corpus()), output / "mllm")
    tokenizer = PromptTokenizer.load(output / "mllm" / "tokenizer.json")
    size = TinyMLLM()
    packer = Packer(tokenizer, grid=size.grid, objects=OBJECTS)
    model = build_mllm(size, tokenizer, seed=recipe.seed)
    none = tokenizer.encode(SemanticPrompt("object", count=0).text)[-1]
    trainer = Trainer(model, size, tokenizer.first_location, recipe.taps, packer.layout, none)
    trainer.to(device).train()
    if recipe.compile:
        for layer in trainer.model.model.language_model.layers:
            layer.compile(dynamic=False)
    opts = optimizers(
        trainer, muon_lr=recipe.muon_lr, adam_lr=recipe.adam_lr, weight_decay=recipe.weight_decay
    )
    ema = Ema(trainer.model, recipe.ema)
    resume = output / "resume.pt"
    budget, step = Budget(recipe.minutes), 0
    if state := load_resume(resume, device):
        trainer.load_state_dict(state["trainer"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        ema.load_state_dict(state["ema"])
        budget, step = Budget(recipe.minutes, state["spent_s"]), int(state["step"])
    level = multiprocessing.Value("i", level_at(budget.progress, recipe))
    render_here = (size.image_size, size.patch, size.merge, "cpu") if device.type == "cpu" else None
    looking = multiprocessing.Value("b", budget.progress < recipe.freeze_vision_at)
    data = Conversations(
        packer,
        batch=recipe.batch,
        seed=recipe.seed,
        start=step,
        level=level,
        looking=looking,
        render_here=render_here,
    )
    loader = DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    log = LossLog(output / "loss.jsonl")
    saved_at = time.monotonic()
    with StopSignal() as stop, budget.bar("mllm") as bar:
        for raw in loader:
            if stop.stopped or budget.progress >= 1.0:
                break
            level.value = level_at(budget.progress, recipe)
            looking.value = budget.progress < recipe.freeze_vision_at
            batch, scenes, repainted = to_device(raw, size, device)
            sigma = 10.0 - 6.0 * budget.progress
            talking = budget.progress >= recipe.look_until and bool((batch["labels"] != IGNORE).any())
            frozen = talking and not looking.value
            with autocast(device):
                if talking:
                    terms = trainer(batch, scenes, repainted, sigma, frozen=frozen)
                else:
                    terms = trainer.look(scenes + repainted if repainted else scenes)[1]
                loss = terms["look"] * (LOOK_SHARE if talking else 1.0)
                if talking:
                    loss = loss + sum(share * terms[name] for name, share in SHARES.items())
            for opt in opts:
                set_lr(opt, cosine(budget.progress))
                opt.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trainer.parameters(), 2.0)
            for opt in opts:
                opt.step()
            ema.update(trainer.model)
            step += 1
            if step % 20 == 0:
                numbers = {k: float(v.detach()) for k, v in terms.items()}
                log.append(step, seconds=budget.elapsed_s, level=level.value, norm=float(norm), **numbers)
                budget.show(bar, " ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
            if time.monotonic() - saved_at > 120:
                _save(output, trainer, ema, opts, budget, step, resume)
                saved_at = time.monotonic()
    _save(output, trainer, ema, opts, budget, step, resume)
    log.plot(output / "loss.png", title="prompt MLLM")
    return output / "mllm"


def _save(
    output: Path,
    trainer: Trainer,
    ema: Ema,
    opts: list[torch.optim.Optimizer],
    budget: Budget,
    step: int,
    resume: Path,
) -> None:
    save_resume(
        resume,
        trainer=trainer.state_dict(),
        optimizers=[opt.state_dict() for opt in opts],
        ema=ema.state_dict(),
        spent_s=budget.elapsed_s,
        step=step,
    )
    with ema.applied(trainer.model):
        save_mllm(trainer.model, output / "mllm")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m ppcr.training.mllm``; returns the exit code."""
    return run_cli(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="ppcr.training.mllm", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/mllm"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--minutes", type=float, default=Recipe.minutes)
    parser.add_argument("--batch", type=int, help="images a step (default: 12 on a CPU, 64 on CUDA)")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument(
        "--workers", type=int, help="loading processes, 0: in this one (default: 1, on CUDA 8)"
    )
    parser.add_argument("--muon-lr", type=float, default=Recipe.muon_lr)
    parser.add_argument("--adam-lr", type=float, default=Recipe.adam_lr)
    parser.add_argument(
        "--compile", action="store_true", help="compile the layers: faster, but needs a C++ compiler"
    )
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run in --output")
    options = parser.parse_args(argv)
    if options.fresh:
        shutil.rmtree(options.output, ignore_errors=True)
    device = pick_device(options.device)
    on_cuda = device.type == "cuda"
    recipe = Recipe(
        minutes=options.minutes,
        batch=options.batch or (CUDA_BATCH if on_cuda else Recipe.batch),
        seed=options.seed,
        muon_lr=options.muon_lr,
        adam_lr=options.adam_lr,
        compile=options.compile,
    )
    folder = train(
        recipe,
        options.output,
        device=device,
        workers=options.workers if options.workers is not None else (CUDA_WORKERS if on_cuda else 1),
    )
    print(folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
