"""Stage 3: from prompts to masks, with the image encoded once, beside the MLLM where a thread is free."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future

import numpy as np
import numpy.typing as npt

from ppcr.framing import Framing
from runtime.bundle import Bundle
from runtime.prompter import Answer
from runtime.session import Features, Float32Array, Prompts, SegmenterSession
from runtime.timing import Stopwatch

Drawing = tuple[npt.NDArray[np.bool_], Float32Array]
"""Instance masks bool [K, H, W] at the original size, and scores f32 [K] in 0..1."""


class Drawer:
    """The segmenter's view of one image. Not thread-safe.

    Args:
        image: uint8 [H, W, 3] RGB, the original.
        background: where `start` encodes the image; None: in the caller's thread, when masks are wanted.
    """

    def __init__(
        self,
        bundle: Bundle,
        segmenter: SegmenterSession,
        image: npt.NDArray[np.uint8],
        background: Executor | None,
    ) -> None:
        self._bundle, self._segmenter = bundle, segmenter
        self._size = image.shape[0], image.shape[1]
        self._framing = Framing.of(self._size, bundle.config.segmenter)
        self._pixels = self._framing.pixels(image)
        self._features: Features | None = None
        self._background = background
        self._encoding: Future[tuple[Features, float]] | None = None

    def start(self) -> None:
        """Begin to encode the image in the background, if there is one and it has not begun."""
        if self._background is not None and self._encoding is None:
            self._encoding = self._background.submit(self._encode)

    def draw(self, answers: Sequence[Answer], watches: Sequence[Stopwatch]) -> list[Drawing]:
        """The masks of all answers as one batch, whose time is shared out equally; none for "none"."""
        nothing = np.zeros((0, *self._size), np.bool_), np.zeros(0, np.float32)
        drawn: list[Drawing] = [nothing] * len(answers)
        wanted = [index for index, answer in enumerate(answers) if answer.spatial.count]
        if not wanted:
            return drawn
        features = self._await_features(watches[wanted[0]])
        start = time.perf_counter()
        prompts = batch_prompts(self._bundle, [answers[index] for index in wanted], self._framing)
        logits, scores = self._segmenter.decode(features, prompts)
        share = (time.perf_counter() - start) / len(wanted)
        first = 0
        for index in wanted:
            rows = slice(first, first + answers[index].spatial.count)
            first = rows.stop
            watches[index].add("decoder", share, share)
            with watches[index].stage("masks"):
                instances = np.stack([self._framing.mask(one) for one in logits[rows]])
            drawn[index] = instances, scores[rows]
        return drawn

    def _encode(self) -> tuple[Features, float]:
        start = time.perf_counter()
        features = self._segmenter.encode(self._pixels)
        return features, time.perf_counter() - start

    def _await_features(self, watch: Stopwatch) -> Features:
        if self._features is None:
            start = time.perf_counter()
            self._features, device = self._encode() if self._encoding is None else self._encoding.result()
            watch.add("encoder", time.perf_counter() - start, device)
        return self._features


def batch_prompts(bundle: Bundle, answers: Sequence[Answer], framing: Framing) -> Prompts:
    """The prompts of several expressions side by side, their texts padded to one length."""
    most = bundle.manifest.shapes.max_text
    counts = [answer.spatial.count for answer in answers]
    texts = [bundle.tokenizer.encode(answer.semantic.text)[:most] for answer in answers]
    ids = np.zeros((len(texts), max(len(text) for text in texts)), np.int64)
    mask = np.zeros(ids.shape, np.bool_)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, True
    return Prompts(
        boxes=framing.place(np.concatenate([answer.spatial.boxes for answer in answers])),
        points=framing.place(np.concatenate([answer.spatial.points for answer in answers])),
        spatial_valid=np.ones(sum(counts), np.float32),
        text_embeddings=np.repeat(bundle.embedding[ids] * mask[..., None], counts, axis=0),
        text_mask=np.repeat(mask, counts, axis=0),
    )
