"""Sessions that answer what a test tells them to, and count what they were asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from runtime import Pipeline, Result
from runtime.bundle import Bundle
from runtime.session import Features, Prompts, Sessions


def assert_same(a: Result, b: Result) -> None:
    assert a.semantic == b.semantic
    np.testing.assert_array_equal(a.spatial.locations, b.spatial.locations)
    np.testing.assert_array_equal(a.instances, b.instances)
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)


@dataclass
class ScriptedMLLM:
    """Answers what it is told to, and notes what it was asked; session and context in one."""

    bundle: Bundle
    answers: list[int]
    read: list[int] = field(default_factory=list)
    images: int = 0

    @property
    def length(self) -> int:
        return len(self.read)

    def encode_image(
        self, patches: npt.NDArray[np.float32], *, size: tuple[int, int] | None = None
    ) -> Features:
        assert size is None  # this bundle has one size alone
        assert patches.shape == (256, 384)
        self.images += 1
        return "features"

    @property
    def capacity(self) -> int:
        return 384

    def open(
        self,
        max_length: int | None = None,
        *,
        prefix: Sequence[int] = (),
        size: tuple[int, int] | None = None,
    ) -> ScriptedMLLM:
        assert self.read == [] and max_length is not None
        self.read.extend(prefix)
        return self

    def truncate(self, length: int) -> None:
        del self.read[length:]

    def extend(self, token_ids: Sequence[int], features: Features | None = None) -> npt.NDArray[np.float32]:
        self.read.extend(token_ids)
        logits = np.zeros(self.bundle.manifest.shapes.vocabulary, np.float32)
        logits[self.answers.pop(0)] = 1
        return logits


@dataclass
class CountingSegmenter:
    """Counts calls; every mask is the upper half of the image."""

    encoded: int = 0
    batches: list[Prompts] = field(default_factory=list)

    def encode(self, pixels: npt.NDArray[np.float32]) -> Features:
        assert pixels.shape == (3, 256, 256) and pixels.dtype == np.float32
        self.encoded += 1
        return self.encoded

    def decode(
        self, features: Features, prompts: Prompts
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        self.batches.append(prompts)
        count = len(prompts.boxes)
        logits = np.ones((count, 128, 128), np.float32)
        logits[:, 64:] = -1
        return logits, np.linspace(0, 1, count, dtype=np.float32)


def scripted(
    bundle: Bundle, *answers: str, threads: int = 1
) -> tuple[Pipeline, ScriptedMLLM, CountingSegmenter]:
    """A pipeline whose MLLM gives these answers in turn."""
    ids = [i for answer in answers for i in bundle.tokenizer.encode(answer)]
    mllm, segmenter = ScriptedMLLM(bundle, ids), CountingSegmenter()
    return Pipeline(bundle, Sessions(mllm, segmenter), threads=threads, engine="fake"), mllm, segmenter


def places(*values: int) -> str:
    return "".join(f"<|loc_{value:03d}|>" for value in values)
