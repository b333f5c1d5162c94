"""Train the segmenter from nothing on rendered scenes.

    python -m ppcr.training.segmenter --mllm checkpoint/mllm --output runs/segmenter --minutes 60

Resumes from `resume.pt` in the output folder when run again. The folder then holds segmenter/ (averaged
weights), loss.jsonl and loss.png. Of the MLLM only tokenizer.json and the input embedding are read; both stay
frozen. When the MLLM has moved on, `--init OLD_RUN/segmenter --rebase-from OLD_MLLM --mllm NEW --train text`
adapts the text path alone; `--minutes 0` stops after the exact change of basis.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ppcr.errors import UsageError, run_cli
from ppcr.model.prompt_encoder import SPATIAL_TOKENS
from ppcr.model.segmenter import Segmenter, SegmenterConfig
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
from ppcr.training.segmenter_data import (
    PromptMix,
    ScenePool,
    TextTable,
    build,
    choose,
    sample_sigma,
)
from ppcr.training.segmenter_eval import Evaluation, pixels
from ppcr.training.segmenter_loss import DenseHead, LossWeights, WordHead, mask_iou, mask_loss
from ppcr.training.segmenter_text import read_embedding, read_encode, rebase_text, same_tokens

RESUME, LOG, PLOT, WEIGHTS = "resume.pt", "loss.jsonl", "loss.png", "segmenter"
_TEXT_PATH = "prompt_encoder.text."


@dataclass(frozen=True)
class Recipe:
    """What a run does; the command line's defaults. `batch` and `pool` of 0 choose by device."""

    minutes: float = 60.0
    batch: int = 0
    prompts: int = 6
    pool: int = 0
    reuse: float = 3.0
    lr: float = 1.5e-3
    weight_decay: float = 0.02
    ema: float = 0.998
    seed: int = 0
    train: str = "all"
    evaluate_minutes: float = 5.0
    save_minutes: float = 1.0


class Trainer:
    """Model, data and optimizer of one run; `run` trains until the budget ends or a signal comes."""

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        *,
        embedding: Tensor,
        encode: Callable[[str], list[int]],
        device: torch.device,
        init: Path | None = None,
        config: SegmenterConfig | None = None,
    ) -> None:
        torch.manual_seed(recipe.seed)
        cuda = device.type == "cuda"
        self.recipe, self.output, self.device = recipe, output, device
        self.batch = recipe.batch or (64 if cuda else 8)
        self.mix = PromptMix()
        # The aids are not part of a saved segmenter: what they would teach a lone text path is noise.
        self.weights = LossWeights() if recipe.train == "all" else LossWeights(dense=0.0, words=0.0)
        self.model = Segmenter.load(init) if init else Segmenter(config)
        self.model.to(device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        dim = self.model.config.dim
        self.aids = nn.ModuleDict({"dense": DenseHead(dim), "words": WordHead(dim)}).to(device)
        self.table = TextTable(embedding.to(device), encode)
        if recipe.train == "text":
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name.startswith(_TEXT_PATH))
        self.optimizer = self._make_optimizer()
        self.ema = Ema(self.model, recipe.ema)
        self.log = LossLog(output / LOG)
        self.budget = Budget(recipe.minutes)
        self.step = 0
        first = 0
        state = load_resume(output / RESUME, device)
        if state is not None:
            first = self._restore(state)
        self.rng = np.random.default_rng((recipe.seed, self.step))
        self.pool = ScenePool(
            recipe.pool or (8192 if cuda else 1536),
            size=self.model.config.image_size,
            device=device,
            first=first,
        )

    def _make_optimizer(self) -> torch.optim.Optimizer:
        modules = [self.model] if self.recipe.train == "text" else [self.model, self.aids]
        parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.recipe.lr, betas=(0.9, 0.98))

    def _restore(self, state: dict[str, object]) -> int:
        if state["train"] != self.recipe.train:
            raise UsageError(f"{self.output} holds a run with --train {state['train']}: use another --output")
        self.model.load_state_dict(state["model"])  # type: ignore[arg-type]
        self.aids.load_state_dict(state["aids"])  # type: ignore[arg-type]
        self.ema.load_state_dict(state["ema"])  # type: ignore[arg-type]
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self.step = int(state["step"])  # type: ignore[call-overload]
        self.budget.spent_s = float(state["spent_s"])  # type: ignore[arg-type]
        return int(state["next_seed"])  # type: ignore[call-overload]

    def save(self) -> None:
        """Write resume.pt, the averaged weights and the plot."""
        save_resume(
            self.output / RESUME,
            train=self.recipe.train,
            model=self.model.state_dict(),
            aids=self.aids.state_dict(),
            ema=self.ema.state_dict(),
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            spent_s=self.budget.elapsed_s,
            next_seed=self.pool.next_seed,
        )
        with self.ema.applied(self.model):
            self.model.save(self.output / WEIGHTS)
        self.log.plot(self.output / PLOT, "segmenter")

    def train_step(self) -> dict[str, Tensor]:
        """One optimizer step; returns the parts of the loss, detached."""
        rows = self.rng.integers(len(self.pool), size=self.batch)
        choices = [choose(self.pool.graphs[r], self.recipe.prompts, self.mix, self.rng) for r in rows]
        sigma = sample_sigma((self.batch, self.recipe.prompts), self.mix, self.rng)
        prompts, targets = build(self.pool, rows, choices, sigma, self.table, self.rng)
        index = torch.from_numpy(rows).to(self.device)
        coverage = targets.coverage()
        with autocast(self.device):
            encoded_image = self.model.image_encoder(pixels(self.pool, index, self.model))
            features = self.model.mask_decoder.prepare(encoded_image)
            encoded = self.model.prompt_encoder(prompts)
            positions = self.model.prompt_encoder.cell_positions
            logits, scores = self.model.mask_decoder(features, encoded, positions)
            cells = encoded_image.image_features
            dense = self.aids["dense"](cells, self.pool, index, targets)
            text_tokens = encoded.tokens[..., SPATIAL_TOKENS:, :]
            words = self.aids["words"](cells, text_tokens, prompts.text_mask.any(-1), targets)
        logits = logits.float()
        dice, focal = mask_loss(logits, coverage)
        iou = mask_iou(logits.detach() > 0, coverage > 0.5)
        score = F.mse_loss(scores, iou)
        w = self.weights
        loss = w.dice * dice + w.focal * focal + w.score * score + w.dense * dense + w.words * words
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update(self.model)
        self.step += 1
        parts = {
            "loss": loss,
            "dice": dice,
            "focal": focal,
            "score": score,
            "dense": dense,
            "words": words,
            "grad_norm": norm,
        }
        spatial = prompts.spatial_valid > 0
        parts["iou"] = iou[spatial].mean()
        parts["iou_text_only"] = iou[~spatial].mean()
        return {name: value.detach() for name, value in parts.items()}

    def run(self) -> None:
        """Train until the time is used up; saves every minute and on Ctrl-C or SIGTERM."""
        recipe, debt = self.recipe, 0.0
        held_out = Evaluation(self.model.config.image_size, self.device)
        self.pool.add(min(self.pool.capacity, 16 * self.batch))
        last_save = last_evaluation = self.budget.elapsed_s
        recent: dict[str, list[float]] = {}
        note = ""
        with StopSignal() as signal, self.budget.bar("segmenter") as bar:
            while self.budget.progress < 1.0 and not signal.stopped:
                set_lr(self.optimizer, cosine(self.budget.progress))
                debt += self.batch / recipe.reuse
                if debt >= _REFILL:
                    self.pool.add(_REFILL)
                    debt -= _REFILL
                self.model.train(recipe.train == "all")
                for name, value in self.train_step().items():
                    recent.setdefault(name, []).append(float(value))
                if self.step % _LOG_STEPS == 0:
                    means = {name: _mean(values) for name, values in recent.items()}
                    self.log.append(self.step, seconds=self.budget.elapsed_s, **means)
                    note = f"step {self.step} loss {means['loss']:.3f} IoU {means['iou']:.3f}"
                    recent = {}
                self.budget.show(bar, note)
                now = self.budget.elapsed_s
                if now - last_evaluation > 60.0 * recipe.evaluate_minutes:
                    self.report(held_out)
                    last_evaluation = self.budget.elapsed_s
                if now - last_save > 60.0 * recipe.save_minutes:
                    self.save()
                    last_save = self.budget.elapsed_s
        self.report(held_out)
        self.save()

    def report(self, held_out: Evaluation) -> dict[str, float]:
        """Evaluate the averaged weights, log and print the figures."""
        with self.ema.applied(self.model):
            figures = held_out(self.model, self.table)
        self.log.append(self.step, seconds=self.budget.elapsed_s, **figures)
        print("\n" + " ".join(f"{name} {value:.4f}" for name, value in figures.items()), flush=True)
        return figures


_REFILL = 32
_LOG_STEPS = 10


def _mean(values: list[float]) -> float:
    """Mean of what was measured: a step without text-only prompts has no IoU of them."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / max(1, len(known))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    defaults = Recipe()
    parser = argparse.ArgumentParser("python -m ppcr.training.segmenter", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--mllm", type=Path, required=True, help="folder with tokenizer.json and model.safetensors"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the run; an existing run is resumed"
    )
    parser.add_argument("--init", type=Path, help="segmenter folder to start from instead of random weights")
    parser.add_argument("--rebase-from", type=Path, help="MLLM folder of --init, to adapt from")
    parser.add_argument("--train", choices=("all", "text"), default=defaults.train, help="what learns")
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" (default %(default)s)')
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument(
        "--minutes", type=float, default=defaults.minutes, help="total, resumed time included"
    )
    parser.add_argument(
        "--batch", type=int, default=defaults.batch, help="scenes a step; 0 chooses by device"
    )
    parser.add_argument("--prompts", type=int, default=defaults.prompts, help="prompts a scene")
    parser.add_argument(
        "--pool", type=int, default=defaults.pool, help="rendered scenes kept; 0 chooses by device"
    )
    parser.add_argument("--reuse", type=float, default=defaults.reuse, help="times a rendered scene is used")
    parser.add_argument("--lr", type=float, default=defaults.lr)
    parser.add_argument("--weight-decay", type=float, default=defaults.weight_decay)
    parser.add_argument("--ema", type=float, default=defaults.ema, help="decay of the averaged weights")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--evaluate-minutes", type=float, default=defaults.evaluate_minutes)
    parser.add_argument("--save-minutes", type=float, default=defaults.save_minutes)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``python -m ppcr.training.segmenter``; returns the exit code."""
    return run_cli(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    options = vars(parse(arguments))
    names = ("mllm", "output", "init", "rebase_from", "device", "threads")
    mllm, output, init, rebase_from, device, threads = (options.pop(name) for name in names)
    if threads:
        torch.set_num_threads(threads)
    started = time.monotonic()
    embedding = read_embedding(mllm)
    if rebase_from and init and not (output / RESUME).exists():
        model = Segmenter.load(init)
        before, after = same_tokens(rebase_from, mllm)
        error = rebase_text(model, read_embedding(rebase_from)[before], embedding[after])
        print(f"{len(after)} tokens carried over to {mllm}, relative error {error:.1e}")
        init = output / "rebased"
        model.save(init)
    trainer = Trainer(
        Recipe(**options),
        output,
        embedding=embedding,
        encode=read_encode(mllm),
        device=pick_device(device),
        init=init,
    )
    trainer.run()
    print(f"{output / WEIGHTS}: {trainer.step} steps, {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
