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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from ppcr.checkpoint import Checkpoint
from ppcr.errors import CheckpointError, EngineError
from ppcr.manifest import Manifest
from ppcr.model.checkpoint import load_mllm
from ppcr.model.segmenters import load_segmenter
from runtime.branches import Block
from runtime.bundle import AUTO, Bundle
from runtime.contexts import SlotContext
from runtime.engine_checks import find_checkpoint
from runtime.positions import make_tables
from runtime.session import Float32Array, Sessions
from runtime.torch_branches import TorchBranches
from runtime.torch_decoder import DeviceTables, TorchDecoder, TorchSlot
from runtime.torch_device import DTYPES, at_work, choose_device, require_room
from runtime.torch_segmenter import TorchSegmenter
from runtime.torch_vision import TorchTower


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
        self,
        slot: TorchSlot,
        token_ids: Sequence[int],
        start: int,
        features: Tensor | None,
        guesses: int = 0,
    ) -> Float32Array:
        """One block of a conversation; logits f32 [vocabulary] after it.

        With ``guesses``, f32 [1 + guesses, vocabulary]: after so many tokens before the last one as well.
        """
        if len(token_ids) == 1 and features is None and token_ids[0] != self._image_token:
            with self._lock:
                return _array(slot.step(token_ids[0], start))
        places = [index for index, token in enumerate(token_ids) if token == self._image_token]
        held = 0 if features is None else features.shape[1]
        if len(places) != held:
            raise ValueError(f"{len(places)} image tokens, but features of {held}")
        with self._lock:
            ids = self._ids(token_ids)
            return _array(slot.block(ids, start, self._ids(places) if places else None, features, guesses))

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
    """A context that several conversations can go on from, and that checks drafts."""

    can_branch = can_verify = True

    def __init__(self, session: TorchMLLM, slot: TorchSlot) -> None:
        super().__init__(session, slot)
        self._mllm = session

    def branch(self, count: int) -> TorchBranches:
        """``count`` conversations that begin with what this one holds, on a cache of their own."""
        return self._mllm.branch(self._slot, self._length, count)

    def verify(self, token_ids: Sequence[int], guesses: int, features: Tensor | None = None) -> Float32Array:
        """Run a block; logits f32 [1 + guesses, vocabulary] after the last token that is no guess, and on."""
        count, start = len(token_ids), self._length
        if not 0 <= guesses < count <= self.capacity - start:
            told = f"{count} tokens, {guesses} of them guesses, do not fit"
            raise ValueError(f"{told} after {start} of a context of {self.capacity}")
        logits = self._mllm.run(self._slot, token_ids, start, features, guesses)
        self._length = start + count
        return logits.reshape(1 + guesses, -1)
