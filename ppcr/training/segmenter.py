"""Train the segmenter from nothing on rendered scenes.

    python -m ppcr.training.segmenter --mllm checkpoint/mllm --output runs/segmenter --minutes 60

Resumes from `resume.pt` in the output folder when run again. The folder then holds segmenter/ (averaged
weights), loss.jsonl and loss.png. Of the MLLM only tokenizer.json and the input embedding are read; both stay
frozen. When the MLLM has moved on, `--init OLD_RUN/segmenter --rebase-from OLD_MLLM --mllm NEW --train text`
adapts the text path alone; `--minutes 0` stops after the exact change of basis.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from ppcr.data.expressions import sample_expressions
from ppcr.data.graph import sample_scene
from ppcr.model.segmenter import Segmenter, SegmenterConfig, normalize
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
    Choice,
    PromptMix,
    ScenePool,
    TextTable,
    build,
    choose,
    sample_sigma,
)
from ppcr.training.segmenter_loss import DenseHead, LossWeights, mask_iou, mask_loss

RESUME, LOG, PLOT, WEIGHTS = "resume.pt", "loss.jsonl", "loss.png", "segmenter"
_EMBEDDING = "embed_tokens.weight"
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


def read_embedding(folder: Path) -> Tensor:
    """The input embedding f32[V, E] of a Hugging Face folder with one model.safetensors.

    Raises:
        ValueError: no tensor of that name.
    """
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        names = [name for name in tensors.keys() if name.endswith(_EMBEDDING)]
        if len(names) != 1:
            raise ValueError(f"{folder}/model.safetensors has {len(names)} tensors *{_EMBEDDING}, need one")
        embedding: Tensor = tensors.get_tensor(names[0]).float()
    return embedding


def read_encode(folder: Path) -> Callable[[str], list[int]]:
    """The folder's tokenizer as text -> ids, without special tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


@torch.no_grad()
def rebase_text(model: Segmenter, old: Tensor, new: Tensor, ridge: float = 1e-4) -> float:
    """Make the text path read `new` rows as it reads the `old` rows of the same tokens, both f32[M, E].

    Solves for the text projection by least squares: exact where the M tokens are fewer than E. Returns the
    relative error that is left.
    """
    text = model.prompt_encoder.text
    wanted = text.projection(text.norm_in(old)).double()
    x = F.pad(text.norm_in(new), (0, 1), value=1.0).double()
    gram = x @ x.T + ridge * torch.eye(len(x), dtype=x.dtype, device=x.device) * x.shape[1]
    solution = x.T @ torch.linalg.solve(gram, wanted)
    text.projection.weight.copy_(solution[:-1].T)
    text.projection.bias.copy_(solution[-1])
    return float((x @ solution - wanted).norm() / wanted.norm())


def same_tokens(old: Path, new: Path, scenes: int = 300) -> tuple[list[int], list[int]]:
    """Ids in both MLLM folders' tokenizers of the tokens that semantic prompts use."""
    before, after = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (old, new))
    rng = np.random.default_rng(0)
    texts = {
        e.semantic.text
        for seed in range(scenes)
        for e in sample_expressions(sample_scene("train", seed), 6, rng)
    }
    used = sorted({token for text in texts for token in before.encode(text, add_special_tokens=False).tokens})
    shared = [token for token in used if after.token_to_id(token) is not None]
    return [before.token_to_id(t) for t in shared], [after.token_to_id(t) for t in shared]


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
        self.mix, self.weights = PromptMix(), LossWeights()
        self.model = Segmenter.load(init) if init else Segmenter(config)
        self.model = self.model.to(device, memory_format=torch.channels_last)
        self.dense = DenseHead(self.model.config.dim).to(device)
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
        modules = [self.model] if self.recipe.train == "text" else [self.model, self.dense]
        parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.recipe.lr, betas=(0.9, 0.98))

    def _restore(self, state: dict[str, object]) -> int:
        if state["train"] != self.recipe.train:
            raise ValueError(f"{self.output} holds a run with --train {state['train']}: use another --output")
        self.model.load_state_dict(state["model"])  # type: ignore[arg-type]
        self.dense.load_state_dict(state["dense"])  # type: ignore[arg-type]
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
            dense=self.dense.state_dict(),
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
            features = self.model.encode(self._pixels(index))
            logits, scores = self.model.decode_batch(features, prompts)
        logits = logits.float()
        dice, focal = mask_loss(logits, coverage)
        iou = mask_iou(logits.detach() > 0, coverage > 0.5)
        score = F.mse_loss(scores, iou)
        with autocast(self.device):
            dense = self.dense(features.image_features, self.pool, index, targets)
        w = self.weights
        loss = w.dice * dice + w.focal * focal + w.score * score + w.dense * dense
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
            "grad_norm": norm,
        }
        spatial = prompts.spatial_valid > 0
        parts["iou"] = iou[spatial].mean()
        parts["iou_text_only"] = iou[~spatial].mean()
        return {name: value.detach() for name, value in parts.items()}

    def _pixels(self, index: Tensor, pool: ScenePool | None = None) -> Tensor:
        images = (pool or self.pool).images[index].float() / 255.0
        return normalize(images, self.model.config).contiguous(memory_format=torch.channels_last)

    def run(self) -> None:
        """Train until the time is used up; saves every minute and on Ctrl-C or SIGTERM."""
        recipe, debt = self.recipe, 0.0
        held_out = Evaluation(self)
        self.pool.add(min(self.pool.capacity, 16 * self.batch))
        last_save = last_evaluation = self.budget.elapsed_s
        sums: dict[str, float] = {}
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
                    sums[name] = sums.get(name, 0.0) + float(value.nan_to_num(0.0)) / _LOG_STEPS
                if self.step % _LOG_STEPS == 0:
                    self.log.append(self.step, seconds=self.budget.elapsed_s, **sums)
                    note = f"step {self.step} loss {sums['loss']:.3f} IoU {sums['iou']:.3f}"
                    sums = {}
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
            figures = held_out(self)
        self.log.append(self.step, seconds=self.budget.elapsed_s, **figures)
        print("\n" + " ".join(f"{name} {value:.4f}" for name, value in figures.items()), flush=True)
        return figures


_REFILL = 32
_LOG_STEPS = 10


class Evaluation:
    """mIoU at full size on fixed val scenes, by kind of prompt."""

    def __init__(self, trainer: Trainer, scenes: int = 64, prompts: int = 4) -> None:
        self.pool = ScenePool(
            scenes, split="val", size=trainer.model.config.image_size, device=trainer.device
        )
        self.pool.add(scenes)
        rng = np.random.default_rng(1)
        mix = PromptMix(drop_text=0.0, drop_spatial=0.0, wrong_box=0.0, levels=(0.0, 0.0, 1.0))
        self.choices = [choose(graph, prompts, mix, rng) for graph in self.pool.graphs]

    @torch.no_grad()
    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """mIoU with exact and jittered boxes (sigma 0.025), without text, without boxes; score error."""
        trainer.model.eval()
        figures: dict[str, float] = {}
        for name, sigma, text, spatial in (
            ("val_true_box", 0.0, True, True),
            ("val_jitter", 0.025, True, True),
            ("val_jitter_no_text", 0.025, False, True),
            ("val_text_only", 0.0, True, False),
        ):
            iou, score = self._measure(trainer, sigma, text, spatial)
            figures[name] = float(iou.mean())
            if name == "val_jitter":
                figures["val_score_error"] = float((score - iou).abs().mean())
        return figures

    def _measure(self, trainer: Trainer, sigma: float, text: bool, spatial: bool) -> tuple[Tensor, Tensor]:
        ious, scores = [], []
        rng = np.random.default_rng(2)
        for start in range(0, len(self.pool), 16):
            rows = np.arange(start, min(start + 16, len(self.pool)))
            choices = [
                [
                    Choice(c.wanted, c.boxed if spatial else -1, c.text if text else "")
                    for c in self.choices[r]
                ]
                for r in rows
            ]
            noise = np.full((len(rows), len(choices[0])), sigma, np.float32)
            prompts, targets = build(self.pool, rows, choices, noise, trainer.table, rng)
            with autocast(trainer.device):
                pixels = trainer._pixels(torch.from_numpy(rows).to(trainer.device), self.pool)
                logits, score = trainer.model(pixels, prompts)
            size = targets.labels.shape[-1]
            logits = F.interpolate(logits.float(), (size, size), mode="bilinear", align_corners=False)
            # Prompts that fill a scene up have no text: without a box they ask for nothing.
            asked = torch.tensor(
                [[bool(self.choices[r][k].text) for k in range(len(choices[0]))] for r in rows]
            )
            keep = asked.to(logits.device)
            ious.append(mask_iou(logits > 0, targets.masks())[keep])
            scores.append(score[keep])
        return torch.cat(ious), torch.cat(scores)


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
