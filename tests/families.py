"""Random Qwen2.5-VL and Qwen3-VL models at any width, saved as hub directories are, and a host for graphs.

Weights are larger than freshly initialised ones: the layers, not the token just read, decide what comes next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from export.decoder_graph import DecoderSizes
from runtime.positions import Rotary, make_tables

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
IMAGE, VIDEO, START, END = 3, 4, 1, 2
PATCH = {"qwen2_5_vl": 14, "qwen3_vl": 16}

# What the published models of each size say of their decoders: hidden, intermediate, heads, key-value heads.
PUBLISHED = {
    "qwen2_5_vl-3B": ("qwen2_5_vl", 2048, 11008, 16, 2, True),
    "qwen2_5_vl-7B": ("qwen2_5_vl", 3584, 18944, 28, 4, False),
    "qwen3_vl-2B": ("qwen3_vl", 2048, 6144, 16, 8, True),
    "qwen3_vl-4B": ("qwen3_vl", 2560, 9728, 32, 8, True),
    "qwen3_vl-8B": ("qwen3_vl", 4096, 12288, 32, 8, False),
}


@dataclass(frozen=True)
class Small:
    """Sizes of one model; the defaults are small and odd, and keep every feature of the family."""

    family: str
    hidden: int = 128
    intermediate: int = 192
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    vocabulary: int = 192
    tied: bool = True
    vision_depth: int = 3
    vision_hidden: int = 64
    vision_intermediate: int = 96
    vision_heads: int = 2
    window: int = 112
    tokens: dict[str, int] = field(default_factory=dict)

    @classmethod
    def published(cls, name: str, **changes: Any) -> Small:
        """The decoder's width of a published model over a small vision tower."""
        family, hidden, intermediate, heads, kv_heads, tied = PUBLISHED[name]
        width: dict[str, Any] = {
            "hidden": hidden, "intermediate": intermediate, "heads": heads, "kv_heads": kv_heads,
            "head_dim": 128, "tied": tied, "layers": 2,
        }  # fmt: skip
        return cls(family, **{**width, **changes})

    @property
    def section(self) -> list[int]:
        pairs = self.head_dim // 2
        small = 5 * pairs // 16 if self.family == "qwen3_vl" else 3 * pairs // 8
        return [pairs - 2 * small, small, small]

    def text(self) -> dict[str, Any]:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": self.section}
        if self.family == "qwen3_vl":
            rope["mrope_interleaved"] = True
        return {
            "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim, "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary, "max_position_embeddings": 4096, "rope_parameters": rope,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": self.tied, "bos_token_id": 0, "eos_token_id": 5,
        }  # fmt: skip

    def vision(self) -> dict[str, Any]:
        common = {
            "depth": self.vision_depth, "hidden_size": self.vision_hidden, "num_heads": self.vision_heads,
            "intermediate_size": self.vision_intermediate, "out_hidden_size": self.hidden,
            "patch_size": PATCH[self.family], "spatial_merge_size": 2, "temporal_patch_size": 2,
        }  # fmt: skip
        if self.family == "qwen3_vl":
            return {**common, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]}
        return {**common, "window_size": self.window, "fullatt_block_indexes": [1]}

    def config(self) -> Qwen2_5_VLConfig | Qwen3VLConfig:
        kind = Qwen3VLConfig if self.family == "qwen3_vl" else Qwen2_5_VLConfig
        tokens = {
            "image_token_id": IMAGE, "video_token_id": VIDEO,
            "vision_start_token_id": START, "vision_end_token_id": END,
        }  # fmt: skip
        return kind(
            text_config=self.text(), vision_config=self.vision(), tie_word_embeddings=self.tied,
            **{**tokens, **self.tokens},
        )  # fmt: skip

    def build(self, *, seed: int = 7) -> Any:
        """The model in float32 and evaluation mode."""
        torch.manual_seed(seed)
        kinds = {
            "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
            "qwen3_vl": Qwen3VLForConditionalGeneration,
        }
        model = kinds[self.family]._from_config(self.config(), attn_implementation="eager").eval()
        scale = 1.5 * (2 / self.hidden) ** 0.5 / 0.02
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2 and ".layers." in name:
                    parameter.mul_(scale)
                elif parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model


def save(model: Any, folder: Path, *, shard: str = "200KB", dtype: torch.dtype | None = None) -> None:
    """As a hub directory: several shards with an index."""
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)


class Talk:
    """A conversation on an exported decoder: one cache, blocks of any length."""

    def __init__(self, session: ort.InferenceSession, sizes: DecoderSizes, length: int = 160) -> None:
        self.session, self.sizes, self.capacity = session, sizes, length
        half = {"tensor(float16)": np.float16, "tensor(bfloat16)": ml_dtypes.bfloat16}
        self.dtype = half.get(session.get_inputs()[0].type, np.float32)
        # Not zero: what lies behind the mask must not matter.
        shape = (1, sizes.kv_heads, length, sizes.head_dim)
        names = [f"{cache}_cache_{i}" for i in range(sizes.layers) for cache in "kv"]
        self.caches = {name: np.full(shape, 3.0, self.dtype) for name in names}
        self.length = 0

    @classmethod
    def open(cls, path: Path, sizes: DecoderSizes) -> Talk:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # this host copies the caches, which onnxruntime remarks on each time
        options.intra_op_num_threads = 1
        return cls(ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]), sizes)

    def again(self) -> Talk:
        return Talk(self.session, self.sizes, self.capacity)

    def look_at(self, start: int, grid: tuple[int, int]) -> None:
        """Say where in the conversation an image of ``grid`` begins."""
        s = self.sizes
        rotary = Rotary(s.head_dim, s.rope_theta, s.mrope_section, s.mrope_interleaved)
        self.tables = make_tables(self.capacity, start, grid, rotary)

    def extend(self, embeddings: np.ndarray, deepstack: list[np.ndarray] | None = None) -> np.ndarray:
        """embeddings f32 [S, hidden], deepstack f32 [S, hidden] each -> logits f32 [vocabulary]."""
        rows = slice(self.length, self.length + len(embeddings))
        added = deepstack or [np.zeros_like(embeddings)] * self.sizes.deepstack
        feeds = {
            "inputs_embeds": embeddings[None].astype(self.dtype),
            "rope_cos": self.tables.cos[None, rows].astype(self.dtype),
            "rope_sin": self.tables.sin[None, rows].astype(self.dtype),
            "write_indices": np.array([self.length]),
            "attn_mask": self.tables.mask[None, None, rows],
            "logits_index": np.array([len(embeddings) - 1]),
            **{f"deepstack_{i}": value[None].astype(self.dtype) for i, value in enumerate(added)},
            **self.caches,
        }
        names = ["logits", *(name.replace("cache_", "cache_out_") for name in self.caches)]
        logits, *caches = self.session.run(names, feeds)
        self.caches = dict(zip(self.caches, caches, strict=True))
        self.length = rows.stop
        return logits[0, 0]


@dataclass(frozen=True)
class Conversation:
    """Ids with one image, its patches, and what the stock model makes of it."""

    ids: list[int]
    patches: torch.Tensor
    grid: tuple[int, int]

    @classmethod
    def random(cls, size: Small, length: int, grid: tuple[int, int]) -> Conversation:
        """``length`` tokens of text around an image of ``grid`` tokens."""
        rng = np.random.default_rng([length, *grid])
        text = rng.integers(8, size.vocabulary, size=length).tolist()
        patch = PATCH[size.family]
        patches = rng.standard_normal((grid[0] * grid[1] * 4, 3 * 2 * patch**2)).astype(np.float32)
        image = [START] + [IMAGE] * (grid[0] * grid[1]) + [END]
        return cls(text[:3] + image + text[3:], torch.from_numpy(patches), grid)

    @property
    def image_start(self) -> int:
        return self.ids.index(IMAGE)

    def inputs(self, ids: list[int] | None = None) -> dict[str, Any]:
        """What the stock forward takes."""
        prompt = torch.tensor([self.ids if ids is None else ids])
        rows, columns = self.grid
        return {
            "input_ids": prompt,
            "attention_mask": torch.ones_like(prompt),
            "pixel_values": self.patches,
            "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
            "mm_token_type_ids": (prompt == IMAGE).long(),
        }

    @torch.no_grad()
    def embedded(self, model: Any) -> tuple[np.ndarray, list[np.ndarray]]:
        """Embeddings with the image's features in place, and DeepStack's rows, as the host makes them."""
        seen = model.model.visual(self.patches, grid_thw=self.inputs()["image_grid_thw"])
        places = np.array(self.ids) == IMAGE
        embeddings = model.get_input_embeddings().weight.numpy()[self.ids].copy()
        embeddings[places] = seen.pooler_output.numpy()
        levels = []
        for features in getattr(seen, "deepstack_features", None) or []:
            rows = np.zeros_like(embeddings)
            rows[places] = features.numpy()
            levels.append(rows)
        return embeddings, levels

    @torch.no_grad()
    def logits(self, model: Any) -> np.ndarray:
        """f32 [length, vocabulary] of the stock model."""
        return model(**self.inputs()).logits[0].float().numpy()

    @torch.no_grad()
    def generate(self, model: Any, ids: list[int], count: int) -> list[int]:
        """``count`` tokens after ``ids``, the image read again, most likely first."""
        full = model.generate(
            **self.inputs(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return full[0, len(ids) :].tolist()


def two_turns(talk: Talk, model: Any, said: Conversation, counts: tuple[int, int]) -> None:
    """Assert that both answers on one cache are those of the stock model reading everything again."""
    table = model.get_input_embeddings().weight.detach().numpy()

    def answer(logits: np.ndarray, count: int) -> list[int]:
        out = [int(logits.argmax())]
        while len(out) < count:
            out.append(int(talk.extend(table[out[-1:]]).argmax()))
        return out

    talk.look_at(said.image_start, said.grid)
    first = answer(talk.extend(*said.embedded(model)), counts[0])
    assert first == said.generate(model, said.ids, counts[0])
    request = [17, 90, 33, 60, 21]
    # The last token of the first answer has not been fed yet.
    second = answer(talk.extend(table[[first[-1], *request]]), counts[1])
    assert second == said.generate(model, said.ids + first + request, counts[1])
    assert len(set(first + second)) > 3  # a model stuck on one token would prove nothing


def worst(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())
