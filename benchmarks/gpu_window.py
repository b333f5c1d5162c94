"""``python benchmarks/gpu_window.py --minutes 28``: everything that a machine with a GPU is needed for.

Kernels, bundle, parity gate of the torch and onnxruntime sessions, latency of the shipped model and of
full-size random ones, training. Each step is a command of its own; what it found is saved as soon as it ends,
and the report (``--save``, default gpu_window) after every step. A step that cannot end in the time that is
left is passed over for the next that can; training is stopped instead, and goes on where it was. Called
again, the window goes on with what has not been done. ``--list`` says what would run, on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import machine, results
from ppcr.errors import CommandParser, EngineError, UsageError, run_cli
from ppcr.files import read_json
from runtime.cuda_driver import first_gpu

DONE, FAILED, STOPPED, SKIPPED = "done", "failed", "stopped", "skipped"
ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "runs" / "gpu_window"
BUNDLE = "bundles/gpu-window"
_MODEL, _SEGMENTER, _FULL = "runs/gpu-mllm", "runs/gpu-segmenter", "qwen2.5-vl-3b+mobile-sam"
_GRACE_S = 25.0  # to write down where training was
_LINES = 12


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        words: after ``python``. needs: steps that must be done before.
        least, most: minutes it takes at least, without which it is not started, and at most.
        goes_on: stopped, it keeps what it has: a later call goes on with it.
        reads: files whose JSON goes into the report.
    """

    name: str
    words: tuple[str, ...]
    least: float
    most: float
    needs: tuple[str, ...] = ()
    goes_on: bool = False
    reads: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What became of a step. tail: the last lines it printed, or why it was not run."""

    name: str
    status: str
    seconds: float = 0.0
    tail: list[str] = field(default_factory=list)
    command: str = ""
    found: dict[str, Any] = field(default_factory=dict)


def steps(train_minutes: float) -> list[Step]:
    """Every step, what is worth most first. train_minutes: of the MLLM; the segmenter takes half as long."""
    build = ("export/build_engines.py", "--output", BUNDLE)
    latency = ("benchmarks/latency.py", "--threads", "2", "--floor", "--batch", "16")
    manifest = f"{BUNDLE}/manifest.json"
    gates = [
        Step(
            f"parity {engine} {precision}",
            (*build, "--check-engine", engine, "--precision", precision, "--parity-scenes", "64"),
            least=0.5, most=4, needs=("bundle",), reads=(manifest,),
        )
        for engine, precision in (
            ("torch", "fp32"), ("torch", "bf16"), ("torch", "fp16"), ("onnxruntime-cuda", "fp32"),
        )
    ]  # fmt: skip
    return [
        Step("kernels", ("benchmarks/kernel.py", "--save", "kernel_gpu"), least=1, most=6),
        Step("bundle", (*build, "--parity-scenes", "16"), least=0.5, most=5, reads=(manifest,)),
        *gates,
        Step(
            "latency",
            (*latency, "--engine", "all", "--bundle", BUNDLE, "--images", "12", "--waterfall",
             "--timeline", "benchmarks/results/timeline_gpu.png", "--save", "latency_gpu"),
            least=1.5, most=6, needs=("bundle",),
        ),
        Step(
            "full-size latency",
            (*latency, "--random-weights", _FULL, "--engine", "torch", "--precision", "bf16", "--images", "4",
             "--work", "runs/gpu-random", "--save", "latency_gpu_3b"),
            least=5, most=9,
        ),
        Step(
            "train the MLLM",
            ("-m", "ppcr.training.mllm", "--device", "cuda", "--compile", "--output", _MODEL,
             "--minutes", f"{train_minutes:g}"),
            least=2, most=train_minutes + 3, goes_on=True,
        ),
        Step(
            "train the segmenter",
            ("-m", "ppcr.training.segmenter", "--device", "cuda", "--mllm", f"{_MODEL}/mllm",
             "--output", _SEGMENTER, "--minutes", f"{train_minutes / 2:g}"),
            least=2, most=train_minutes / 2 + 3, needs=("train the MLLM",), goes_on=True,
        ),
    ]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    made = CommandParser(description="Everything that a GPU is needed for, in the minutes that there are.")
    made.add_argument(
        "--minutes", type=float, default=28.0, metavar="M", help="to be used at most (default: %(default)g)"
    )
    made.add_argument(
        "--train-minutes", type=float, default=12.0, metavar="M", help="of the MLLM (default: %(default)g)"
    )
    made.add_argument("--only", metavar="A,B", help="these steps alone (--list names them)")
    made.add_argument("--again", action="store_true", help="also what the report says was done before")
    made.add_argument("--list", action="store_true", help="print the steps and their minutes; run nothing")
    results.add_option(made)
    made.set_defaults(save="gpu_window")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_cli(lambda: _main(parser().parse_args(words), words))


def _main(options: argparse.Namespace, words: Sequence[str]) -> int:
    results.check_name(options.save)
    for name in ("minutes", "train_minutes"):
        if not getattr(options, name) > 0:
            raise UsageError(f"--{name.replace('_', '-')} must be more than 0, not {getattr(options, name)}")
    wanted = _chosen(steps(options.train_minutes), options.only)
    if options.list:
        print(
            "\n".join(f"{one.name:<28}{one.least:>5g} to {one.most:>4g} min  {_told(one)}" for one in wanted)
        )
        return 0
    try:
        gpu = first_gpu()
    except EngineError as error:
        raise EngineError(f"{error}: this needs a GPU (--list says what it would run)") from None
    report = results.RESULTS / f"{options.save}.json"
    before = {} if options.again else _done(report)
    described = {**machine.describe(), "target": gpu.target}

    def save(outcomes: Sequence[Outcome]) -> None:
        record = {"steps": [asdict(outcome) for outcome in outcomes]}
        results.save(options.save, "gpu_window.py", words, described, record)

    LOGS.mkdir(parents=True, exist_ok=True)
    found = run_window(wanted, 60 * options.minutes, before, save)
    for outcome in found:
        print(f"{outcome.name:<28}{outcome.status:<9}{outcome.seconds:>7.0f} s  {(outcome.tail or [''])[-1]}")
    print(json.dumps({"benchmark": "gpu_window", "steps": {one.name: one.status for one in found}}))
    if failed := [outcome.name for outcome in found if outcome.status == FAILED]:
        raise EngineError(f"failed: {', '.join(failed)}; their output is in {LOGS}")
    return 0


def run_window(
    wanted: Sequence[Step],
    seconds: float,
    before: Mapping[str, Outcome],
    save: Callable[[Sequence[Outcome]], None],
    *,
    run: Callable[[Step, float], Outcome] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run what fits into ``seconds``, in order; ``save`` is told of all outcomes after each step.

    before: outcomes of an earlier call; what is done there is not run again. run, clock: for tests.
    """
    start, outcomes = clock(), list[Outcome]()
    done = {name for name, outcome in before.items() if outcome.status == DONE}
    for step in wanted:
        left = seconds - (clock() - start)
        waiting = [name for name in step.needs if name not in done]
        if step.name in done:
            outcome = before[step.name]
        elif waiting:
            outcome = Outcome(step.name, SKIPPED, tail=[f"it needs: {', '.join(waiting)}"])
        elif left < 60 * step.least:
            told = f"{left / 60:.1f} of at least {step.least:g} minutes were left"
            outcome = Outcome(step.name, SKIPPED, tail=[told])
        else:
            outcome = (run or run_step)(step, min(left, 60 * step.most))
        if outcome.status == DONE:
            done.add(step.name)
        outcomes.append(outcome)
        save(outcomes)
    return outcomes


def run_step(step: Step, seconds: float) -> Outcome:
    """Run one command for ``seconds`` at most, its output in a file of its own."""
    log, command = LOGS / f"{step.name.replace(' ', '-')}.log", [sys.executable, *step.words]
    print(f"--- {step.name}: {_told(step)}", flush=True)
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as out:
        # A group of its own: its workers end with it.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        grace = _GRACE_S if step.goes_on else 0.0
        stopped = False
        try:
            process.wait(max(1.0, seconds - grace))
        except subprocess.TimeoutExpired:
            stopped = True
            _end(process, grace)
        except BaseException:
            _end(process, grace)
            raise
    status = DONE if process.returncode == 0 and not stopped else STOPPED if stopped else FAILED
    if stopped and not step.goes_on:
        status = FAILED
    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES:]
    tail = [line.rpartition("\r")[2] for line in tail]
    if stopped:
        tail.append(f"stopped after {seconds / 60:.1f} minutes" + (", goes on" if step.goes_on else ""))
    return Outcome(step.name, status, round(time.monotonic() - start, 1), tail, _told(step), _read(step))


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    """Ask the group of ``process`` to end, and make it after ``grace`` seconds."""
    for number, patience in ((signal.SIGTERM, max(grace, 5.0)), (signal.SIGKILL, 30.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
            return
        except ProcessLookupError:
            process.wait()
            return
        except subprocess.TimeoutExpired:
            continue


def _read(step: Step) -> dict[str, Any]:
    """The parity figures of the manifests that a step wrote into."""
    found: dict[str, Any] = {}
    for name in step.reads:
        if (ROOT / name).is_file():
            found |= read_json(ROOT / name, EngineError, missing=f"{name} is missing").get("parity", {})
    return found


def _done(report: Path) -> dict[str, Outcome]:
    """Outcomes of an earlier call by step."""
    if not report.is_file():
        return {}
    held = read_json(report, UsageError, missing=f"{report} is missing", cure="remove it, or use --again")
    return {one["name"]: Outcome(**one) for one in held.get("steps", [])}


def _chosen(all_steps: Sequence[Step], only: str | None) -> list[Step]:
    if only is None:
        return list(all_steps)
    names = [name.strip() for name in only.split(",")]
    known = [step.name for step in all_steps]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"--only does not know {unknown[0]!r}: give some of {', '.join(known)}")
    return [step for step in all_steps if step.name in names]


def _told(step: Step) -> str:
    return f"python {' '.join(step.words)}"


if __name__ == "__main__":
    sys.exit(main())
