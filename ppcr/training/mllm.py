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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Qwen2_5_VLForConditionalGeneration

from ppcr.data.expressions import sample_expressions
from ppcr.data.graph import sample_scene
from ppcr.model.checkpoint import save_mllm
from ppcr.model.mllm import PLAIN, TinyMLLM, build_mllm, text_hidden, vision_features
from ppcr.model.tokenizer import save_tokenizer, train_tokenizer
from ppcr.prompts import LOCATION_BINS
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
from ppcr.training.grounding_loss import ObjectHead, PlaceHead, PointingHead, location_targets
from ppcr.training.mllm_data import Conversations, Scenes, draw
from ppcr.training.packing import IGNORE, Packer

CUDA_BATCH, CUDA_WORKERS = 64, 8
LOOK_SHARE = 0.3
SHARES = {"word": 1.0, "place": 0.5, "spell": 0.3, "point": 0.7, "fits": 0.15, "many": 0.3}
"""Weight of each loss term once the model talks; looking alone weighs 1, then LOOK_SHARE."""


@dataclass(frozen=True)
class Recipe:
    """One training run; command-line defaults come from here."""

    minutes: float = 15.0
    batch: int = 12
    length: int = 576
    conversations: int = 12
    muon_lr: float = 3e-3
    adam_lr: float = 1.5e-3
    weight_decay: float = 0.02
    ema: float = 0.998
    look_until: float = 0.05
    level_1_at: float = 0.15
    level_2_at: float = 0.30
    # The tower sees what it will by then, and a fifth of the time of a step is its backward pass.
    freeze_vision_at: float = 0.6
    # After how many layers of the language model landmarks, then targets, should be found.
    taps: tuple[int, int] = (2, 4)
    seed: int = 0


class Trainer(nn.Module):
    """The MLLM and its training-only heads; ``forward`` gives the loss terms of one batch."""

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        size: TinyMLLM,
        first_location: int,
        taps: tuple[int, int],
    ) -> None:
        super().__init__()
        self.model, self.size, self.first_location, self.taps = model, size, first_location, taps
        self.objects = ObjectHead(size.hidden, size.grid)
        self.pointing = PointingHead(size.hidden, size.grid)
        self.places = PlaceHead(size.hidden, size.grid)

    def look(self, scenes: Scenes, *, frozen: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Image tokens [B, 64, hidden] and the terms of the object head; ``frozen`` learns nothing here."""
        with torch.set_grad_enabled(not frozen):
            features = vision_features(self.model, scenes.patches, self.size.grid)
            terms = self.objects(features, scenes.boxes, scenes.points, scenes.classes, scenes.present)
        return features, terms

    def forward(
        self, batch: dict[str, Tensor], scenes: Scenes, sigma: float, *, frozen: bool = False
    ) -> dict[str, Tensor]:
        """Terms of looking and talking; ``sigma`` is the softness of location targets in bins."""
        features, terms = self.look(scenes, frozen=frozen)
        coordinates = torch.cat([scenes.points, scenes.boxes], -1).flatten(1)  # [B, N*6]

        def values(reference: Tensor) -> Tensor:
            return coordinates.gather(1, reference.clamp(min=0))

        located = (values(batch["reference"]) * LOCATION_BINS).long().clamp(0, LOCATION_BINS - 1)
        ids = torch.where(batch["reference"] >= 0, located + self.first_location, batch["ids"])
        language = self.model.model.language_model
        embeddings = language.embed_tokens(ids)
        is_image = ids == self.model.config.image_token_id
        embeddings = embeddings.masked_scatter(is_image[..., None], features.to(embeddings.dtype))
        hidden, (early, late) = text_hidden(
            language, embeddings, batch["positions"].transpose(0, 1), batch["mask"], taps=self.taps
        )
        table = language.embed_tokens.weight
        words = batch["labels"] != IGNORE
        logits = (hidden[words] @ table[: self.first_location].T).float()
        labels, weight = batch["labels"][words], batch["weight"][words]
        losses = F.cross_entropy(logits, labels, reduction="none")
        terms["word"] = (losses * weight).sum() / weight.sum()
        places = batch["label_reference"] >= 0
        locations = table[self.first_location : self.first_location + LOCATION_BINS]
        place_logits = (hidden[places] @ locations.T).float()
        true_values = values(batch["label_reference"])[places]
        soft = location_targets(true_values, sigma)
        terms["place"] = -(soft * place_logits.log_softmax(-1)).sum(-1).mean()
        rows = batch["pointing"] >= 0
        scene = torch.nonzero(rows)[:, 0]
        conversation = batch["pointing"][rows]
        wanted = torch.stack([batch["targets"], batch["landmarks"]], 2)[scene, conversation]
        centres = (scenes.boxes[..., :2] + scenes.boxes[..., 2:]) / 2
        found, image = (h[is_image].view(ids.shape[0], -1, h.shape[-1]) for h in (early, late))
        terms |= self.pointing((late[rows], early[rows]), scene, (image, found), centres, wanted)
        coordinates = coordinates.view(*scenes.present.shape, -1)
        terms["spell"] = self.places(image, coordinates, scenes.present, locations, sigma)
        with torch.no_grad():
            right = (logits.argmax(-1) == labels).float()
            counted = weight > 1
            terms["words"] = right[~counted].mean()
            terms["count"] = right[counted].mean()
            off = (place_logits.argmax(-1) + 0.5) / LOCATION_BINS - true_values
            terms["within_3pc"] = (off.abs() < 0.03).float().mean()
            terms["off"] = off.abs().mean()
        return terms


def optimizers(trainer: Trainer, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for embeddings, norms, biases and heads."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in trainer.named_parameters():
        inside = ".layers." in name or ".blocks." in name or ".merger.mlp" in name
        (matrices if inside and parameter.ndim == 2 else rest).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=recipe.adam_lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def to_device(
    batch: dict[str, Any], size: TinyMLLM, device: torch.device
) -> tuple[dict[str, Tensor], Scenes]:
    scenes = batch.pop("scenes")
    if not isinstance(scenes, Scenes):
        scenes = draw(scenes, size.image_size, size.patch, size.merge, device)
    batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
    if device.type == "cpu":  # plain_attention adds its mask
        batch["mask"] = torch.zeros(batch["mask"].shape, dtype=torch.bfloat16).masked_fill_(
            ~batch["mask"], -1e4
        )
    return batch, scenes


def corpus(scenes: int = 4000, *, seed: int = 0) -> list[str]:
    """Expressions and semantic prompts of training scenes, for the tokenizer."""
    lines = []
    for index in range(scenes):
        rng = np.random.default_rng((seed, index))
        for expression in sample_expressions(sample_scene("train", index), 4, rng, 2):
            lines += [expression.text, expression.semantic.text]
    return lines


def level_at(progress: float, recipe: Recipe) -> int:
    """Grammar level by progress; -1 while only looking."""
    return sum(progress >= t for t in (recipe.look_until, recipe.level_1_at, recipe.level_2_at)) - 1


def train(recipe: Recipe, output: Path, *, device: torch.device, workers: int) -> Path:
    """Train until the budget is spent or a stop signal comes. Returns the MLLM's directory."""
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "mllm" / "tokenizer.json").exists():
        save_tokenizer(train_tokenizer(corpus()), output / "mllm")
    tokenizer = PromptTokenizer.load(output / "mllm" / "tokenizer.json")
    size = TinyMLLM()
    trainer = Trainer(
        build_mllm(size, tokenizer, seed=recipe.seed), size, tokenizer.first_location, recipe.taps
    )
    trainer.to(device).train()
    if device.type == "cpu":
        trainer.model.model.language_model.config._attn_implementation = PLAIN
    opts = optimizers(trainer, recipe)
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
    packer = Packer(
        tokenizer,
        grid=size.grid,
        length=recipe.length,
        objects=14,
        conversations=recipe.conversations,
    )
    render_here = (size.image_size, size.patch, size.merge, "cpu") if device.type == "cpu" else None
    data = Conversations(
        packer, batch=recipe.batch, seed=recipe.seed, start=step, level=level, render_here=render_here
    )
    loader = DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)
    log = LossLog(output / "loss.jsonl")
    saved_at = time.monotonic()
    with StopSignal() as stop, budget.bar("mllm") as bar:
        for raw in loader:
            if stop.stopped or budget.progress >= 1.0:
                break
            level.value = level_at(budget.progress, recipe)
            batch, scenes = to_device(raw, size, device)
            sigma = 10.0 - 6.0 * budget.progress
            talking = budget.progress >= recipe.look_until and bool((batch["labels"] != IGNORE).any())
            frozen = talking and budget.progress >= recipe.freeze_vision_at
            with autocast(device):
                terms = trainer(batch, scenes, sigma, frozen=frozen) if talking else trainer.look(scenes)[1]
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
                bar.n = round(budget.elapsed_s)
                bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in numbers.items()), refresh=True)
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
    """Command line of ``python -m ppcr.training.mllm``."""
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
