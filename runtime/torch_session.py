"""torch on a GPU, or on the CPU: static KV cache, the decoding step a CUDA graph, our own Triton kernels.

It reads the checkpoint that the bundle was made from, whose hash the manifest has: a bundle holds graphs, and
torch needs modules. Tokenizer, preprocessing and sizes are the bundle's. The vision tower is
`runtime.torch_vision` (Qwen3-VL's is the stock one), the decoder `runtime.torch_decoder`, the segmenter
`ppcr.model`'s, which runs the kernels of ``kernels/`` on a GPU. Executed on the CPU, where tests hold it to
the reference; the CUDA graphs are built, but not executed.
Blocks of several conversations (`TorchBranches`) differ from call to call and are no CUDA graph.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.utils import logging

from ppcr.checkpoint import Checkpoint
from ppcr.errors import CheckpointError, EngineError
from ppcr.manifest import Manifest
from ppcr.model.checkpoint import load_mllm
from ppcr.model.prompt_encoder import Prompts as TensorPrompts
from ppcr.model.segmenters import AnyFeatures, AnySegmenter, load_segmenter
from runtime.branches import Block
from runtime.bundle import AUTO, Bundle
from runtime.contexts import SlotContext
from runtime.engine_checks import find_checkpoint
from runtime.positions import make_tables
from runtime.session import Float32Array, Prompts, Sessions
from runtime.torch_branches import TorchBranches
from runtime.torch_decoder import DeviceTables, TorchDecoder, TorchSlot
from runtime.torch_device import DTYPES, at_work, choose_device, require_room
from runtime.torch_graph import Recorded, record
from runtime.torch_vision import TorchTower

MASK_PIXELS = 1 << 22
"""Pixels of mask logits drawn at once: 64 masks of SAM's."""


def load(
    bundle: Bundle,
    *,
    threads: int,
    checkpoint: Path | None = None,
    precision: str = AUTO,
    device: str | None = None,
) -> Sessions:
    """Both sessions of a bundle from the weights of its checkpoint.

    Args:
        threads: processors to use where the device is the CPU.
        checkpoint: that the bundle was made from; default: the shipped one, where it is that.
        precision: of `DTYPES`; "auto": fp32.
        device: as torch names them; default: the GPU where there is one, else the CPU.

    Raises:
        EngineError: the device is not there, or has no room. CheckpointError: another or a broken checkpoint.
    """
    where = choose_device(device)
    name = "fp32" if precision == AUTO else precision
    if name not in DTYPES:
        raise EngineError(
            f"torch computes in {', '.join(DTYPES)}, not in {name}: choose one with --precision"
        )
    if where.type == "cpu":
        torch.set_num_threads(threads)
    source = _open(bundle.manifest, checkpoint)
    require_room(_bytes_needed(source, bundle, DTYPES[name]), name, where)
    return _load(bundle, source, name, where)


@at_work
def _load(bundle: Bundle, source: Checkpoint, precision: str, device: torch.device) -> Sessions:
    dtype = DTYPES[precision]
    if precision == "fp32":
        # Else a GPU rounds what convolutions read to ten bits, and near ties of tokens fall otherwise.
        torch.backends.cudnn.allow_tf32 = False
    with _quiet():
        model = load_mllm(source.mllm)
    model = model.to(device, dtype)
    try:
        segmenter = load_segmenter(source.segmenter).to(device)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot read {source.segmenter}: {error}") from None
    sessions = TorchMLLM(model, bundle), TorchSegmenter(segmenter, dtype)
    return Sessions(*sessions, precision=precision, device=device.type)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its bar while it reads weights."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _open(manifest: Manifest, given: Path | None) -> Checkpoint:
    checkpoint = Checkpoint.open(find_checkpoint(manifest, given))
    if checkpoint.source_hash() != manifest.source:
        raise CheckpointError(
            f"{checkpoint.root} is not the checkpoint that this bundle was made from: give that one, or "
            f"build again: python export/build_engines.py --force --checkpoint {checkpoint.root}"
        )
    return checkpoint


def _bytes_needed(source: Checkpoint, bundle: Bundle, dtype: torch.dtype) -> int:
    """Of weights and of one cache; what a run needs besides is small."""
    tensors, shapes = (source.mllm_tensors, source.segmenter_tensors), bundle.manifest.shapes
    numbers = sum(int(np.prod(files.shape(name))) for files in tensors for name in files)
    cache = 2 * shapes.layers * shapes.kv_heads * shapes.max_length * shapes.head_dim
    return (numbers + cache) * dtype.itemsize


class TorchMLLM:
    """`runtime.session.MLLMSession`. Threads may share it; their blocks run one after the other."""

    def __init__(self, model: Any, bundle: Bundle) -> None:
        self._config, self._shapes = bundle.config.mllm, bundle.manifest.shapes
        self._image_token = bundle.tokenizer.image_token
        self._image_start, self._rotary = len(bundle.tokenizer.before_image), bundle.rotary
        self._visual = model.model.visual
        self._decoder = TorchDecoder(model, self._shapes)
        self._like = self._decoder.table[:0]
        self._lock = threading.Lock()
        self._tables: dict[tuple[int, int], DeviceTables] = {}
        self._towers: dict[tuple[int, int], TorchTower] = {}
        self._free: list[TorchSlot] = []
        self._prefixes: dict[tuple[int, ...], Tensor] = {}
        # The first conversation finds its cache made and its step captured, the first image its tower.
        self._free.append(self._slot(self._config.image_size))
        self._tower_of(self._config.image_size)

    @at_work
    def encode_image(self, patches: Float32Array, *, size: tuple[int, int] | None = None) -> Tensor:
        """Patches f32 [patches, patch_dim] to features f[1 + levels, image_tokens, hidden] on the device."""
        height, width = size or self._config.image_size
        patch = self._config.patch
        with self._lock:
            tower = self._tower_of((height, width))
            if tower is not None:
                return tower.encode(patches)[None]
            grid = torch.tensor([[1, height // patch, width // patch]], device=self._like.device)
            seen = self._visual(torch.from_numpy(patches).to(self._like), grid_thw=grid)
        return torch.stack(_features(seen))

    @at_work
    def open(
        self,
        max_length: int | None = None,
        *,
        prefix: Sequence[int] = (),
        size: tuple[int, int] | None = None,
    ) -> TorchContext:
        """A conversation that begins with ``prefix``, computed the first time and copied from then on.

        Its cache is that of a conversation that ended, or a new one.
        """
        most = self._shapes.max_length
        if max_length is not None and not 0 < max_length <= most:
            raise ValueError(f"a context of {max_length} tokens: this bundle's cache holds 1 to {most}")
        size, key = size or self._config.image_size, tuple(prefix)
        with self._lock:
            tables = self._tables_of(size)
            fitting = [slot for slot in self._free if slot.tables is tables]
            slot = fitting[-1] if fitting else self._slot(size)
            if fitting:
                self._free.remove(slot)
            context = TorchContext(self, slot)
            if not key:
                return context
            # Positions of the text before an image do not depend on the image's size.
            if key in self._prefixes:
                slot.restore(self._prefixes[key])
            else:
                slot.block(self._ids(key), 0, None, None)
                self._prefixes = {key: slot.snapshot(len(key))}
            context.begin(len(key))
        return context

    @at_work
    def run(
        self, slot: TorchSlot, token_ids: Sequence[int], start: int, features: Tensor | None
    ) -> Float32Array:
        """One block of a conversation; logits f32 [vocabulary] after it."""
        if len(token_ids) == 1 and features is None and token_ids[0] != self._image_token:
            with self._lock:
                return _array(slot.step(token_ids[0], start))
        places = [index for index, token in enumerate(token_ids) if token == self._image_token]
        held = 0 if features is None else features.shape[1]
        if len(places) != held:
            raise ValueError(f"{len(places)} image tokens, but features of {held}")
        with self._lock:
            ids = self._ids(token_ids)
            return _array(slot.block(ids, start, self._ids(places) if places else None, features))

    @at_work
    def branch(self, slot: TorchSlot, length: int, count: int) -> TorchBranches:
        """``count`` conversations that begin with the first ``length`` tokens of a slot's."""
        with self._lock:
            trunk = slot.snapshot(length)
        return TorchBranches(self, trunk, slot.tables, count)

    @at_work
    def run_branches(self, block: Block, cache: Tensor, tables: DeviceTables) -> tuple[Float32Array, Tensor]:
        """A block of branches; logits f32 [n, vocabulary], and the cache, made larger if need be."""
        if self._image_token in block.ids:
            raise ValueError("image tokens belong to what all branches begin with")
        with self._lock:
            slots = block.mask.shape[1]
            if cache.shape[3] != slots:
                held, cache = cache, self._decoder.cache(slots)
                cache[:, :, :, : block.start] = held[:, :, :, : block.start]
            ids, at, mask, last = (
                torch.from_numpy(part).to(cache.device)
                for part in (block.ids, block.positions, block.mask, block.last)
            )
            logits = self._decoder.run_branches(ids, at, block.start, mask, last, cache, tables)
            return _array(logits.cpu()), cache

    def release(self, slot: TorchSlot) -> None:
        """A conversation ended: the next may have its cache."""
        self._free.append(slot)

    def _ids(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.int64, device=self._like.device)

    def _slot(self, size: tuple[int, int]) -> TorchSlot:
        return TorchSlot(self._decoder, self._tables_of(size), graph=self._like.is_cuda)

    def _tower_of(self, size: tuple[int, int]) -> TorchTower | None:
        """Our own tower for images of ``size``; None for families that have the stock one alone."""
        if self._config.family != "qwen2_5_vl" or self._visual.config.hidden_act != "silu":
            return None
        if size not in self._towers:
            height, width = (side // self._config.patch for side in size)
            self._towers[size] = TorchTower(self._visual, (height, width), graph=self._like.is_cuda)
        return self._towers[size]

    def _tables_of(self, size: tuple[int, int]) -> DeviceTables:
        if size not in self._tables:
            grid = self._config.grid_of(size)
            tables = make_tables(self._shapes.max_length, self._image_start, grid, self._rotary)
            self._tables[size] = DeviceTables.of(tables, self._like)
        return self._tables[size]


def _features(seen: Any) -> list[Tensor]:
    """Features of one image and of DeepStack's levels, as transformers 5 (named) and 4.57 answer."""
    if hasattr(seen, "pooler_output"):
        return [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or [])]
    return [seen] if isinstance(seen, Tensor) else [seen[0], *seen[1]]


def _array(logits: Tensor) -> Float32Array:
    found: Float32Array = logits.numpy()
    return found


class TorchContext(SlotContext[TorchSlot]):
    """A context that several conversations can go on from."""

    can_branch = True

    def __init__(self, session: TorchMLLM, slot: TorchSlot) -> None:
        super().__init__(session, slot)
        self._mllm = session

    def branch(self, count: int) -> TorchBranches:
        """``count`` conversations that begin with what this one holds, on a cache of their own."""
        return self._mllm.branch(self._slot, self._length, count)


class TorchSegmenter:
    """`runtime.session.SegmenterSession`. Threads may share it; their images are encoded one after the other.

    Boxes, points and text are read in float32 always: a half-precision corner would be pixels off. On a GPU
    it works on a stream of its own, beside the decoding steps, and the image encoder is one CUDA graph: its
    hundreds of launches would take the processor from these steps.
    """

    def __init__(self, segmenter: AnySegmenter, dtype: torch.dtype) -> None:
        self._segmenter, self._dtype = segmenter.eval(), dtype
        for part in (segmenter.image_encoder, segmenter.mask_decoder):
            part.to(dtype)
        self._device = next(segmenter.parameters()).device
        on_gpu, side = self._device.type == "cuda", segmenter.config.image_size
        self._pixels = torch.zeros(1, 3, side, side, dtype=dtype, device=self._device)
        # Page-locked: the GPU copies from it without the processor.
        self._staged = torch.zeros(1, 3, side, side, pin_memory=on_gpu)
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        self._recorded: Recorded[AnyFeatures] | None = None
        if on_gpu:
            self._recorded = record(self._see, "the image encoder")
            self._stream = torch.cuda.Stream()
            # Not before the weights are there, in their type.
            self._stream.wait_stream(torch.cuda.current_stream())
        self._most = max(1, MASK_PIXELS // segmenter.config.mask_size**2)

    @at_work
    def encode(self, pixels: Float32Array) -> AnyFeatures:
        """Pixels f32 [3, H, W] to the features of one image on the device."""
        with self._lock, self._at_work():
            self._staged[0].copy_(torch.from_numpy(pixels))
            self._pixels.copy_(self._staged, non_blocking=True)
            if self._recorded is None:
                features = self._see()
            else:
                seen = self._recorded.replay()
                # The next image is written over these.
                features = type(seen)(*(part.clone() for part in seen))
            self._wait()
        return features

    def _see(self) -> AnyFeatures:
        features: AnyFeatures = self._segmenter.encode(self._pixels)
        return features

    @at_work
    def decode(self, features: AnyFeatures, prompts: Prompts) -> tuple[Float32Array, Float32Array]:
        """Mask logits f32 [N, h, w] and scores f32 [N]."""
        parts = []
        with self._at_work():
            for first in range(0, len(prompts.boxes), self._most):
                rows = slice(first, first + self._most)
                given = (self._tensor(part[rows]) for part in vars(prompts).values())
                logits, scores = self._draw(features, TensorPrompts(*given))
                parts.append((logits.float().cpu().numpy(), scores.float().cpu().numpy()))
        masks, all_scores = zip(*parts, strict=True)
        return np.concatenate(masks), np.concatenate(all_scores)

    def _draw(self, features: AnyFeatures, prompts: TensorPrompts) -> tuple[Tensor, Tensor]:
        """As the segmenter's own `decode_batch`, with what it read of the prompts brought to one type."""
        encoder: Any = self._segmenter.prompt_encoder
        encoded = encoder(prompts)
        encoded = type(encoded)(*(part.to(self._dtype) for part in encoded))
        positions = encoder.cell_positions.to(self._dtype)
        masks, scores = self._segmenter.mask_decoder(features, encoded, positions)
        return masks.squeeze(0), scores.squeeze(0)

    def _tensor(self, values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values))[None].to(self._device)

    def _at_work(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()
