"""Make the sample images shipped with the package: ``python -m ppcr.data.samples``.

The first one suits the expression of the demo; the others are the first scenes of the test split that offer
each kind of expression. ``samples.json`` holds, for each image, expressions and their true masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppcr.data.graph import SceneGraph, sample_scene
from ppcr.data.relations import Phrase, Query, resolve
from ppcr.data.render import render
from ppcr.data.scenes import scene_examples
from ppcr.errors import CommandParser, run_cli
from ppcr.files import ensured_directory, write_json
from ppcr.masks import encode_rle, save_png

DEMO = "all red spheres behind the green cube"
SIZE = 256
_DEMO_QUERY = Query(
    Phrase(shape="sphere", color="red", relation="behind", landmarks=(Phrase(shape="cube", color="green"),)),
    plural=True,
)
# One sample each, in this order; kinds as in ``ppcr.data.expressions``.
KINDS = ("two_hop", "superlative", "between", "negation", "none_attribute")


def demo_scene() -> tuple[SceneGraph, tuple[int, ...]]:
    """The first test scene in which the demo's expression has two targets, and a red sphere it leaves out."""
    for seed in range(1_000_000):
        graph = sample_scene("test", seed)
        targets = resolve(graph, _DEMO_QUERY)
        if not isinstance(targets, tuple) or len(targets) != 2:
            continue
        spheres = sum(graph.describe(i)[1::2] == ("red", "sphere") for i in range(len(graph)))
        if spheres > len(targets):
            return graph, targets
    raise LookupError("no test scene suits the demo's expression: has the sampler changed?")


def samples() -> Iterator[tuple[SceneGraph, list[tuple[str, tuple[int, ...]]]]]:
    """Each sample's scene, and its expressions with their targets."""
    graph, targets = demo_scene()
    yield graph, [(DEMO, targets)]
    wanted = list(KINDS)
    for example in scene_examples("test", range(1000), expressions=4):
        if wanted and any(e.kind == wanted[0] for e in example.expressions):
            first = sorted(example.expressions, key=lambda e: e.kind != wanted[0])
            del wanted[0]
            yield example.graph, [(e.text, e.targets) for e in first]


def write_samples(output: Path) -> Path:
    """Write scene_<i>.png (256 x 256) and samples.json. Returns the latter's path. Raises OutputError."""
    with ensured_directory(output):
        return _write_samples(output)


def _write_samples(output: Path) -> Path:
    listing: list[dict[str, Any]] = []
    for number, (graph, expressions) in enumerate(samples()):
        rendered = render([graph], SIZE)
        image = (rendered.image[0].permute(1, 2, 0) * 255).round().to("cpu").numpy().astype(np.uint8)
        masks = rendered.masks[0].cpu().numpy()
        name = f"scene_{number}.png"
        save_png(image, output / name)
        listing.append(
            {
                "image": name,
                "split": graph.split,
                "seed": graph.seed,
                "expressions": [
                    {"text": text, "masks": [encode_rle(masks[i]) for i in targets]}
                    for text, targets in expressions
                ],
            }
        )
    write_json(output / "samples.json", listing)
    return output / "samples.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (`ppcr.errors`)."""
    return run_cli(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = CommandParser(prog="python -m ppcr.data.samples", description="Write the sample images.")
    parser.add_argument("--output", type=Path, default=Path("ppcr/assets/samples"), metavar="DIR")
    print(write_samples(parser.parse_args(argv).output))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
