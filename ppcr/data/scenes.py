"""The front of the scene data: evaluation examples, and a contact sheet to look at.

python -m ppcr.data.scenes --sheet sheet.png --split test --count 12
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ppcr.data.expressions import Expression, sample_expressions
from ppcr.data.graph import SPLITS, SceneGraph, Split, sample_scene

_EXPRESSION_STREAM = 7919  # sets the expressions' random stream apart from every scene's own
_TINT = np.array((1.0, 0.1, 0.55), np.float32)
_MARGIN = 8
_LINE = 15


@dataclass(frozen=True)
class SceneExample:
    """One evaluation scene: ``graph`` is ``sample_scene(split, index)``; its expressions are fixed too."""

    split: Split
    index: int
    graph: SceneGraph
    expressions: tuple[Expression, ...]


def scene_example(split: Split, index: int, *, expressions: int = 1, level: int = 2) -> SceneExample:
    """The evaluation example of one scene; asking for more expressions leaves the first ones as they are."""
    graph = sample_scene(split, index)
    rng = np.random.default_rng((_EXPRESSION_STREAM, SPLITS.index(split), index))
    return SceneExample(split, index, graph, tuple(sample_expressions(graph, expressions, rng, level)))


def scene_examples(
    split: Split, indices: Iterable[int], *, expressions: int = 1, level: int = 2
) -> Iterator[SceneExample]:
    """Evaluation examples of a split, in the order of ``indices``.

    ``scene_examples("test", range(1000))`` is the documented test: 1,000 scenes with one expression each.

    Raises:
        ValueError: an unknown split or a negative index.
    """
    return (scene_example(split, index, expressions=expressions, level=level) for index in indices)


def contact_sheet(examples: Sequence[SceneExample], *, size: int = 256, columns: int = 4) -> Image.Image:
    """Scenes with their first expression: targets tinted and outlined, landmarks outlined in white.

    Under each image: the kind, the expression, the semantic prompt.
    """
    from ppcr.data.render import render  # torch is only needed to draw

    font = ImageFont.load_default(12)
    rendered = render([example.graph for example in examples], size=size)
    images = rendered.image.permute(0, 2, 3, 1).cpu().numpy()
    masks = rendered.masks.cpu().numpy()
    captions = [
        [
            (line, color)
            for text, color in (
                (f"{example.split} {example.index}: {example.expressions[0].kind}", "#666666"),
                (example.expressions[0].text, "#000000"),
                (example.expressions[0].semantic.text, "#0050b0"),
            )
            for line in textwrap.wrap(text, size // 6)
        ]
        for example in examples
    ]
    width = size + _MARGIN
    starts = range(0, len(examples), columns)
    heights = [size + 2 * _MARGIN + _LINE * max(map(len, captions[i : i + columns])) for i in starts]
    sheet = Image.new("RGB", (columns * width + _MARGIN, sum(heights) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for k, example in enumerate(examples):
        expression = example.expressions[0]
        picture = marked(images[k], masks[k][list(expression.targets)], masks[k][list(expression.landmarks)])
        left, top = _MARGIN + k % columns * width, _MARGIN + sum(heights[: k // columns])
        sheet.paste(Image.fromarray((picture * 255).round().astype(np.uint8)), (left, top))
        for row, (line, color) in enumerate(captions[k]):
            draw.text((left, top + size + 2 + row * _LINE), line, fill=color, font=font)
    return sheet


def marked(image: np.ndarray, targets: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """A copy of f32 [S, S, 3] in 0..1 with bool masks [K, S, S] tinted (targets) and outlined (both)."""
    picture = image.copy()
    for mask in landmarks:
        picture[outline(mask)] = 1.0
    for mask in targets:  # lightly, so that the colour can still be read
        picture[mask] = 0.85 * picture[mask] + 0.15 * _TINT
        picture[outline(mask)] = _TINT
    return picture


def outline(mask: np.ndarray) -> np.ndarray:
    """The two-pixel inner border of a bool mask [S, S]."""
    inside = mask.copy()
    for _ in range(2):
        padded = np.pad(inside, 1)
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m ppcr.data.scenes", description="Draw a contact sheet.")
    parser.add_argument("--sheet", type=Path, required=True, help="picture to write, for example sheet.png")
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--count", type=int, default=12, help="scenes (default %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="index of the first scene (default %(default)s)")
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--level", type=int, choices=(0, 1, 2), default=2, help="how hard to say")
    options = parser.parse_args(arguments)
    if options.count < 1 or options.columns < 1 or options.start < 0:
        parser.error("--count and --columns must be at least 1, --start at least 0")
    indices = range(options.start, options.start + options.count)
    examples = list(scene_examples(options.split, indices, level=options.level))
    sheet = contact_sheet(examples, columns=min(options.columns, options.count))
    try:
        sheet.save(options.sheet)
    except (OSError, ValueError) as error:
        parser.exit(1, f"cannot write {options.sheet}: {error}\n")
    print(options.sheet)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
