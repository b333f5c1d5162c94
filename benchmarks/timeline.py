"""A picture of one request: what the MLLM, the image encoder and the host did when (`benchmarks.tracing`)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from benchmarks.tracing import ENCODER, MLLM, STREAMS, Event, Trace
from ppcr.errors import EngineError, OutputError
from ppcr.files import atomic_file

COLOURS = {
    "open": "#b0b7c3", "vision": "#7b61c4", "semantic": "#2f6fb7", "spatial": "#1f9e89", "encoder": "#e08a1e",
    "image": "#8a8f98", "decoder": "#c0392b", "masks": "#d98880",
}  # fmt: skip
_NAMES = {
    "open": "new cache", "vision": "vision tower", "semantic": "stage 1, semantic prompt",
    "spatial": "stage 2, spatial prompt", "encoder": "image encoder", "image": "read and resize",
    "decoder": "mask decoder", "masks": "masks at full size",
}  # fmt: skip


def check(path: Path) -> None:
    """Refuse what cannot be drawn or written, before anything is measured.

    Raises:
        EngineError: matplotlib is missing. OutputError: not the name of a picture.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise EngineError("--timeline needs matplotlib: pip install '.[train]' brings it")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise OutputError(f"cannot write {path}: a timeline is a .png, .svg or .pdf file")


def hidden(trace: Trace) -> float:
    """Share of the image encoder's work that the MLLM was busy beside, 0..1; 0 when it never ran."""
    mllm = [event for event in trace.events if event.stream == MLLM]
    encodes = [event for event in trace.events if event.stream == ENCODER]
    work = sum(event.end - event.start for event in encodes)
    beside = sum(_shared(encode, other) for encode in encodes for other in mllm)
    return beside / work if work else 0.0


def _shared(one: Event, other: Event) -> float:
    return max(0.0, min(one.end, other.end) - max(one.start, other.start))


def draw(trace: Trace, path: Path, title: str) -> None:
    """Write the picture.

    Raises:
        OutputError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(figsize=(11, 3.4))
    for event in trace.events:
        row = STREAMS.index(event.stream)
        left, width = 1e3 * event.start, 1e3 * (event.end - event.start)
        axes.barh(
            row, width, left=left, height=0.62, color=COLOURS[event.stage], edgecolor="white", linewidth=0.4
        )
        _label(axes, event, row, left, width, 1e3 * trace.seconds)
    axes.axvline(1e3 * trace.seconds, color="#444444", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(STREAMS)), STREAMS)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02e3 * trace.seconds)
    axes.set_xlabel("ms since the image was given")
    axes.set_title(title, fontsize=10, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    seen = {event.stage for event in trace.events}
    patches = [Patch(color=COLOURS[stage], label=_NAMES[stage]) for stage in _NAMES if stage in seen]
    axes.legend(
        handles=patches, ncol=4, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.22)
    )
    figure.tight_layout()
    try:
        with atomic_file(path) as part:
            figure.savefig(part, dpi=150, bbox_inches="tight", format=os.path.splitext(path)[1][1:].lower())
    finally:
        pyplot.close(figure)


def _label(axes: Any, event: Event, row: int, left: float, width: float, whole: float) -> None:
    """How many tokens a block read, or what a bar took, where there is room for it."""
    if width < 0.055 * whole:
        return
    text = f"{event.tokens} tokens\n{width:.1f} ms" if event.tokens > 1 else f"{width:.1f} ms"
    axes.text(left + width / 2, row, text, ha="center", va="center", fontsize=7, color="white")
