"""A checkpoint and a bundle of random weights at the shipped sizes, made once per test session.

Random weights answer nonsense, but they answer it deterministically: enough to hold the runtime to its
promises (one cache or two, one expression or several, given or computed) without a trained model.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from safetensors.numpy import save_file

from export.decoder_graph import DecoderSizes, write_decoder
from export.segmenter_graph import write_image_encoder, write_mask_decoder
from export.vision_graph import write_vision
from ppcr.checkpoint import Checkpoint
from ppcr.config import PPCRConfig
from ppcr.files import write_json
from ppcr.manifest import (
    EMBEDDING,
    EMBEDDING_KEY,
    PREPROCESS,
    TOKENIZER,
    FileEntry,
    Manifest,
    Shapes,
    files_below,
)
from ppcr.model.checkpoint import save_mllm
from ppcr.model.mllm import TinyMLLM, build_mllm
from ppcr.model.segmenter import Segmenter
from ppcr.model.tokenizer import save_tokenizer, train_tokenizer
from ppcr.tokenizer import PromptTokenizer

GRAPHS = {
    "vision": "mllm/vision.onnx",
    "decoder": "mllm/decoder.onnx",
    "image_encoder": "segmenter/image_encoder.onnx",
    "mask_decoder": "segmenter/mask_decoder.onnx",
}
CORPUS = [
    f"the {size} {color} {material} {shape} left of the {other} cube"
    for size in ("small", "large")
    for color in ("red", "green", "blue")
    for material in ("rubber", "metal")
    for shape in ("sphere", "cube", "cone")
    for other in ("gray", "yellow")
]


@cache
def workplace() -> Path:
    """A folder that goes away with the process."""
    folder = Path(tempfile.mkdtemp(prefix="ppcr-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def tokenizer() -> PromptTokenizer:
    """A tokenizer over a few words of the scenes."""
    return PromptTokenizer(train_tokenizer(CORPUS))


@cache
def random_checkpoint() -> Path:
    """A whole checkpoint directory of random weights."""
    root = workplace() / "checkpoint"
    # A seed whose answers to the tests' expressions are not "none".
    model = build_mllm(TinyMLLM(), tokenizer(), seed=1).eval()
    with torch.no_grad():
        # Untrained logits lie so close together that rounding could decide; these do not.
        model.model.language_model.norm.weight.mul_(8.0)
    save_mllm(model, root / "mllm")
    save_tokenizer(tokenizer().tokenizer, root / "mllm")
    torch.manual_seed(3)
    Segmenter().save(root / "segmenter")
    write_json(root / "config.json", PPCRConfig(name="random").to_dict())
    return root


@cache
def random_bundle() -> Path:
    """A bundle of `random_checkpoint`: fp32 graphs, and the same again called int8. Not to be changed."""
    root = workplace() / "bundle"
    checkpoint = Checkpoint.open(random_checkpoint())
    segmenter = Segmenter.load(checkpoint.segmenter)
    for folder in ("mllm", "segmenter"):
        (root / folder).mkdir(parents=True)
    config, tensors, speech = checkpoint.mllm_config, checkpoint.mllm_tensors, checkpoint.config.mllm
    write_vision(config, tensors, root / GRAPHS["vision"], image_size=speech.image_size)
    sizes = write_decoder(config, tensors, root / GRAPHS["decoder"])
    write_image_encoder(segmenter, root / GRAPHS["image_encoder"])
    write_mask_decoder(segmenter, root / GRAPHS["mask_decoder"])
    int8 = {role: name.replace(".onnx", ".int8.onnx") for role, name in GRAPHS.items()}
    for role, name in int8.items():
        shutil.copy(root / GRAPHS[role], root / name)
    save_file({EMBEDDING_KEY: checkpoint.embedding()}, root / EMBEDDING)
    shutil.copy(checkpoint.tokenizer, root / TOKENIZER)
    write_json(root / PREPROCESS, checkpoint.config.to_dict())
    manifest = Manifest(
        name="random",
        source=checkpoint.source_hash(),
        target="cpu",
        opset=24,
        tools={"onnxruntime": onnxruntime.__version__},
        box_convention=checkpoint.config.box_convention,
        precisions={"fp32": dict(GRAPHS), "int8": int8},
        files={name: FileEntry.of(root / name) for name in files_below(root)},
        shapes=shapes(checkpoint.config, sizes, segmenter),
        default_precision="fp32",
    )
    manifest.save(root)
    return root


def shapes(config: PPCRConfig, sizes: DecoderSizes, segmenter: Segmenter) -> Shapes:
    """The manifest's shapes of a checkpoint."""
    speech, side = config.mllm, segmenter.config.mask_size
    return Shapes(
        max_length=speech.max_length,
        image_tokens=speech.image_tokens,
        grid=speech.grid,
        patches=speech.image_tokens * speech.merge**2,
        patch_dim=3 * speech.temporal * speech.patch**2,
        layers=sizes.layers,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        hidden=sizes.hidden,
        vocabulary=sizes.vocabulary,
        rope_theta=sizes.rope_theta,
        mrope_section=sizes.mrope_section,
        image_size=config.segmenter.image_size,
        mask_size=(side, side),
        max_text=segmenter.config.max_text,
    )


def picture(seed: int = 0, height: int = 120, width: int = 160) -> np.ndarray:
    """uint8 [height, width, 3]: smooth random colours, so that resizing keeps something to see."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(8, 0).repeat(8, 1)[:height, :width])
