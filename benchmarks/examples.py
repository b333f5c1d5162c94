"""Evaluation scenes as both benchmarks use them: pictures, expressions and true masks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppcr import masks
from ppcr.data.expressions import Expression
from ppcr.data.graph import Split
from ppcr.data.render import render
from ppcr.data.scenes import scene_example

SIZE = 256
_BATCH = 16


@dataclass(frozen=True)
class Example:
    """One scene.

    Attributes:
        image: uint8 [S, S, 3] RGB.
        expressions: about it.
        truths: bool [len(expressions), S, S], all visible pixels of each expression's targets.
    """

    image: npt.NDArray[np.uint8]
    expressions: tuple[Expression, ...]
    truths: npt.NDArray[np.bool_]


def examples(
    split: Split, indices: Sequence[int], *, expressions: int = 1, size: int = SIZE
) -> Iterator[Example]:
    """Examples of a split, rendered at ``size`` pixels a few at a time.

    More expressions to a scene leave the first ones as they are. Raises ValueError for a negative index.
    """
    for start in range(0, len(indices), _BATCH):
        scenes = [scene_example(split, i, expressions=expressions) for i in indices[start : start + _BATCH]]
        rendered = render([scene.graph for scene in scenes], size=size)
        pictures = (rendered.image.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
        for scene, picture, visible in zip(scenes, pictures, rendered.masks.numpy(), strict=True):
            wanted = [masks.union(visible[list(one.targets)]) for one in scene.expressions]
            yield Example(picture, scene.expressions, np.stack(wanted))
