"""One training step of the prompt MLLM: the model with its training-only heads, and its optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from ppcr.model.mllm import TinyMLLM, text_hidden, vision_features
from ppcr.model.slot_attention import SLOTS, Layout
from ppcr.prompts import LOCATION_BINS
from ppcr.training.grounding_loss import ObjectHead, PlaceHead, PointingHead, StandingHead, location_targets
from ppcr.training.mllm_data import Scenes, draw
from ppcr.training.packing import IGNORE
from ppcr.training.supervision import QUESTIONS

LOOK_SHARE = 0.3
SHARES = {"word": 1.0, "place": 0.5, "spell": 0.3, "point": 0.7, "fits": 0.3, "many": 0.3, "stand": 1.0}
"""Weight of each loss term once the model talks; looking alone weighs 1, then LOOK_SHARE."""

READ_BACK_ERROR = 6.0
"""Standard deviation, in bins, of the noise on coordinates that are read back: the error of the answers."""


class Trainer(nn.Module):
    """The MLLM and its training-only heads; ``forward`` gives the loss terms of one batch."""

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        size: TinyMLLM,
        first_location: int,
        taps: tuple[int, int, int],
        layout: Layout,
        none: int,
    ) -> None:
        super().__init__()
        self.model, self.size, self.first_location, self.taps = model, size, first_location, taps
        self.layout, self.none = layout, none
        model.model.language_model.config._attn_implementation = SLOTS
        self.objects = ObjectHead(size.hidden, size.grid)
        self.pointing = PointingHead(size.hidden, size.grid)
        self.standing = StandingHead(size.hidden, size.grid)
        self.places = PlaceHead(size.hidden, size.grid)

    def look(self, scenes: Scenes, *, frozen: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Image tokens [B, 64, hidden] and the terms of the object head; ``frozen`` learns nothing here."""
        with torch.set_grad_enabled(not frozen):
            features = vision_features(self.model, scenes.patches, self.size.grid)
            terms = self.objects(features, scenes.boxes, scenes.points, scenes.classes, scenes.present)
        return features, terms

    def forward(
        self,
        batch: dict[str, Tensor],
        scenes: Scenes,
        repainted: Scenes | None,
        sigma: float,
        *,
        frozen: bool = False,
    ) -> dict[str, Tensor]:
        """Terms of looking and talking; repainted scenes are only looked at.

        ``sigma`` is the softness of location targets in bins; ``frozen`` leaves the tower as it is.
        """
        features, terms = self.look(scenes + repainted if repainted else scenes, frozen=frozen)
        features = features[: len(scenes.boxes)]
        coordinates = torch.cat([scenes.points, scenes.boxes], -1).flatten(1)  # [B, N*6]

        def values(reference: Tensor) -> Tensor:
            return coordinates.gather(1, reference.clamp(min=0))

        # What is read back at inference is the model's own answer, some bins off: trained on exact places
        # alone, it would find the next coordinate of one of several targets by the exact bins of the last.
        read_back = values(batch["reference"]) * LOCATION_BINS
        read_back = read_back + torch.randn_like(read_back) * READ_BACK_ERROR
        located = read_back.long().clamp(0, LOCATION_BINS - 1)
        ids = torch.where(batch["reference"] >= 0, located + self.first_location, batch["ids"])
        language = self.model.model.language_model
        embeddings = language.embed_tokens(ids)
        is_image = ids == self.model.config.image_token_id
        embeddings = embeddings.masked_scatter(is_image[..., None], features.to(embeddings.dtype))
        hidden, tapped = text_hidden(
            language, embeddings, batch["positions"].transpose(0, 1), self.layout, taps=self.taps
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
        wanted = batch["wanted"][torch.nonzero(rows)[:, 0], batch["pointing"][rows]]
        centres = (scenes.boxes[..., :2] + scenes.boxes[..., 2:]) / 2
        seen, related, image = (h[is_image].view(ids.shape[0], -1, h.shape[-1]) for h in tapped)
        early, middle, late = tapped
        asked = wanted[:, : len(QUESTIONS)]
        terms |= self.pointing((late, early, early), (image, seen, seen), rows, centres, asked)
        terms |= self.standing(middle, related, rows, centres, wanted[:, -2], wanted[:, -1])
        coordinates = coordinates.view(*scenes.present.shape, -1)
        terms["spell"] = self.places(image, coordinates, scenes.present, locations, sigma)
        with torch.no_grad():
            right = (logits.argmax(-1) == labels).float()
            counted = weight > 1
            terms["words"] = right[~counted].mean()
            terms["count"] = right[counted].mean()
            terms["none"] = right[counted & (labels == self.none)].mean()
            off = (place_logits.argmax(-1) + 0.5) / LOCATION_BINS - true_values
            terms["within_3pc"] = (off.abs() < 0.03).float().mean()
            terms["off"] = off.abs().mean()
        return terms


def optimizers(
    trainer: Trainer, *, muon_lr: float, adam_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for embeddings, norms, biases and heads."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in trainer.named_parameters():
        inside = ".layers." in name or ".blocks." in name or ".merger.mlp" in name
        (matrices if inside and parameter.ndim == 2 else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=adam_lr, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def to_device(
    batch: dict[str, Any], size: TinyMLLM, device: torch.device
) -> tuple[dict[str, Tensor], Scenes, Scenes | None]:
    """A loaded batch on the device: its tensors, its scenes, and the repainted scenes if any came along."""
    scenes, repainted = batch.pop("scenes"), batch.pop("repainted", None)
    view = (size.image_size, size.patch, size.merge, device)
    if not isinstance(scenes, Scenes):
        scenes = draw(scenes, *view)
    if repainted is not None and not isinstance(repainted, Scenes):
        graphs, paint = repainted
        repainted = draw(graphs, *view, albedo=paint)
    return {k: v.to(device, non_blocking=True) for k, v in batch.items()}, scenes, repainted
