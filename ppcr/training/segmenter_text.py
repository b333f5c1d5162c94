"""What the segmenter takes from an MLLM folder, embedding and tokenizer; and moving to another embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from ppcr.data.expressions import sample_expressions
from ppcr.data.graph import sample_scene
from ppcr.errors import CheckpointError
from ppcr.model.segmenter import Segmenter

_EMBEDDING = "embed_tokens.weight"


def read_embedding(folder: Path) -> Tensor:
    """The input embedding f32[V, E] of a Hugging Face folder with one model.safetensors.

    Raises:
        CheckpointError: no such file, or not one tensor of that name.
    """
    path = folder / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.endswith(_EMBEDDING)]
            if len(names) != 1:
                raise CheckpointError(f"{path} has {len(names)} tensors *{_EMBEDDING}, need one")
            embedding: Tensor = tensors.get_tensor(names[0]).float()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; train the MLLM first") from None
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
    pairs = [(before.token_to_id(token), after.token_to_id(token)) for token in used]
    shared = [(old_id, new_id) for old_id, new_id in pairs if old_id is not None and new_id is not None]
    return [old_id for old_id, _ in shared], [new_id for _, new_id in shared]
