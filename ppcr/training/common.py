"""What both training commands share: EMA, resumable state, schedule, time budget, stop signal, loss log."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn
from tqdm import tqdm


def pick_device(name: str) -> torch.device:
    """Resolve "auto" to CUDA where there is one, else the CPU; other names pass through to torch."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def autocast(device: torch.device, enabled: bool = True) -> torch.autocast:
    """bf16 autocast on `device`: weights and optimizer state stay fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def cosine(progress: float, *, warmup: float = 0.02, floor: float = 0.02) -> float:
    """Learning-rate factor at `progress` in 0..1: linear warm-up, then half a cosine down to `floor`."""
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    t = min(1.0, (progress - warmup) / max(1e-9, 1.0 - warmup))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * t))


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group's learning rate to `factor` times its first one (kept in the group as "base_lr")."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group.setdefault("base_lr", group["lr"])


class Ema:
    """Exponential moving average of a module's parameters and floating-point buffers.

    The decay warms up as (1 + n) / (10 + n), so a short run is not dominated by its first weights.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards `model`; call once after each optimizer step."""
        self.updates += 1
        weight = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                averaged.append(self.shadow[name])
                current.append(value)
            else:
                self.shadow[name].copy_(value)
        torch._foreach_lerp_(averaged, current, weight)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Run the body with the averaged weights in `model`; the trained ones come back afterwards."""
        kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.shadow)
        try:
            yield model
        finally:
            model.load_state_dict(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = int(state["updates"])
        for name, value in state["shadow"].items():
            self.shadow[name].copy_(value)


def save_resume(path: str | Path, **state: Any) -> None:
    """Write tensors, numbers, strings and containers of them. A kill leaves the old or the new file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def load_resume(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """Read what save_resume wrote, or None where there is nothing yet. No code is unpickled."""
    path = Path(path)
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state


@dataclass
class Budget:
    """Time spent against time allowed, counted over resumed runs; `progress` drives the schedule."""

    minutes: float
    spent_s: float = 0.0
    _started: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        return self.spent_s + time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """Fraction of the budget used, 0..1."""
        return min(1.0, self.elapsed_s / max(1e-9, 60.0 * self.minutes))

    def bar(self, label: str) -> tqdm[Any]:
        """A progress bar in seconds of this budget; call `show` on it after each step."""
        return tqdm(total=max(1, round(60.0 * self.minutes)), desc=label, bar_format=_BAR, mininterval=2.0)

    def show(self, bar: tqdm[Any], note: str = "") -> None:
        """Move `bar` to the time spent; draws at most every two seconds."""
        if note:
            bar.set_postfix_str(note, refresh=False)
        # Never past the total: tqdm would drop it.
        bar.update(min(round(self.elapsed_s), bar.total) - bar.n)


_BAR = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} s{postfix}"


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a flag, so that the loop can save; a second one interrupts."""

    def __init__(self) -> None:
        self.stopped = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True


class LossLog:
    """Appends one JSON object a line, and draws every numeric column of the file against the step."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, step: int, **values: float | str) -> None:
        rounded = {k: v if isinstance(v, str) else round(float(v), 6) for k, v in values.items()}
        row = {"step": step, **rounded}
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All rows written so far, a half-written last line left out."""
        if not self.path.exists():
            return []
        rows: list[dict[str, Any]] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def plot(self, png: str | Path, title: str = "") -> None:
        """Write a PNG with one small panel for each numeric column, with a running mean over it."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        rows = self.rows()
        names = [n for n in dict.fromkeys(k for row in rows for k in row) if n not in ("step", "seconds")]
        series = {n: [(r["step"], r[n]) for r in rows if isinstance(r.get(n), int | float)] for n in names}
        series = {name: points for name, points in series.items() if points}
        if not series:
            return
        columns = min(3, len(series))
        lines = -(-len(series) // columns)
        size = (4.2 * columns, 2.8 * lines)
        # Constrained: a tight layout of many lines draws the title over the panels.
        figure, axes = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
        for axis in axes.flat[len(series) :]:
            axis.set_visible(False)
        for axis, (name, points) in zip(axes.flat, series.items(), strict=False):
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, linewidth=0.5, alpha=0.4)
            axis.plot(steps, _running_mean(values), linewidth=1.5)
            axis.set_title(name, fontsize=9)
            axis.grid(alpha=0.3)
        figure.suptitle(title)
        partial = Path(png).with_suffix(".partial.png")
        figure.savefig(partial, dpi=110)
        pyplot.close(figure)
        os.replace(partial, png)


def _running_mean(values: tuple[float, ...]) -> list[float]:
    keep = 1.0 - 1.0 / max(1.0, len(values) / 30)
    mean, out = values[0], []
    for value in values:
        mean = keep * mean + (1.0 - keep) * value
        out.append(mean)
    return out
