"""The window on a GPU without one: which steps run in the time there is, and what is kept of them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks import gpu_window, results
from benchmarks.gpu_window import DONE, FAILED, SKIPPED, STOPPED, Outcome, Step, main, run_step, run_window
from ppcr.errors import EngineError, UsageError
from runtime.cuda_driver import Gpu


class Clock:
    """Minutes that pass when a stubbed step says so."""

    def __init__(self, takes: dict[str, float], fails: tuple[str, ...] = ()) -> None:
        self.now, self.takes, self.fails = 1000.0, takes, fails
        self.given: dict[str, float] = {}

    def __call__(self) -> float:
        return self.now

    def run(self, step: Step, seconds: float) -> Outcome:
        self.given[step.name] = seconds / 60
        wanted = 60 * self.takes[step.name]
        self.now += min(wanted, seconds)
        if step.name in self.fails:
            return Outcome(step.name, FAILED)
        return Outcome(step.name, DONE if wanted <= seconds else STOPPED)


def step(name: str, least: float, most: float, *needs: str, goes_on: bool = False) -> Step:
    return Step(name, ("-c", "pass"), least, most, needs, goes_on)


STEPS = [
    step("a", 1, 5), step("b", 6, 9), step("c", 1, 3, "a"), step("d", 1, 3, "b"),
    step("train", 2, 20, goes_on=True),
]  # fmt: skip


def test_what_does_not_fit_is_passed_over_for_what_does() -> None:
    clock, saved = Clock({"a": 3, "b": 7, "c": 2, "train": 10}), list[list[str]]()
    found = run_window(
        STEPS, 60 * 8, {}, lambda all_of: saved.append([o.name for o in all_of]), run=clock.run, clock=clock
    )
    status = {outcome.name: outcome.status for outcome in found}
    assert status == {"a": DONE, "b": SKIPPED, "c": DONE, "d": SKIPPED, "train": STOPPED}
    assert clock.given == {"a": 5, "c": 3, "train": 3}
    assert clock.now - 1000 == 60 * 8
    assert "5.0 of at least 6 minutes" in found[1].tail[0] and found[3].tail == ["it needs: b"]
    assert saved == [[s.name for s in STEPS[: n + 1]] for n in range(len(STEPS))], "not saved after each step"


def test_a_second_call_goes_on_with_what_was_not_done() -> None:
    first = Clock({"a": 3, "b": 7, "c": 2, "train": 10})
    before = run_window(STEPS, 60 * 8, {}, lambda _: None, run=first.run, clock=first)
    clock = Clock({"b": 7, "d": 1, "train": 10}, fails=("d",))
    again = run_window(
        STEPS, 60 * 30, {o.name: o for o in before}, lambda _: None, run=clock.run, clock=clock
    )
    assert [outcome.status for outcome in again] == [DONE, DONE, DONE, FAILED, DONE]
    assert set(clock.given) == {"b", "d", "train"}
    assert clock.given["train"] == 20, "the most it may take"


def test_what_needs_a_failed_step_is_not_run() -> None:
    clock = Clock({"a": 1, "b": 7, "d": 1, "train": 1}, fails=("a",))
    found = run_window(STEPS, 60 * 30, {}, lambda _: None, run=clock.run, clock=clock)
    assert [outcome.status for outcome in found] == [FAILED, DONE, SKIPPED, DONE, DONE]


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu_window, "LOGS", tmp_path)
    return tmp_path


def program(text: str) -> Step:
    return Step("x y", ("-c", text), 0.01, 1)


def test_a_step_is_a_process_with_its_output_kept(logs: Path) -> None:
    good = run_step(program("print('one'); print('two')"), 60)
    assert (good.status, good.tail) == (DONE, ["one", "two"])
    assert (logs / "x-y.log").read_text() == "one\ntwo\n"
    bad = run_step(program("import sys; sys.exit('error: no')"), 60)
    assert (bad.status, bad.tail) == (FAILED, ["error: no"])


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_step_that_takes_too_long_is_stopped_with_its_workers(
    logs: Path, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_window, "_GRACE_S", 0.5)
    text = (
        "import signal, subprocess, sys, time\n"
        "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(worker.pid, flush=True)\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))\n"
        "time.sleep(600)\n"
    )
    started = time.monotonic()
    # Long enough for a slow machine to start both processes.
    found = run_step(Step("long", ("-c", text), 0, 1, goes_on=goes_on), 10)
    assert time.monotonic() - started < 60
    assert found.status == (STOPPED if goes_on else FAILED)
    worker, saved, told = found.tail
    assert saved == "saved" and told.startswith("stopped after 0.2 minutes")
    for _ in range(100):
        if not is_running(int(worker)):
            break
        time.sleep(0.1)
    assert not is_running(int(worker))


def is_running(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_report_is_written_after_every_step(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_window, "first_gpu", lambda: Gpu("sm_90", 13000))
    listed = [program("print(1)"), Step("second", ("-c", "import sys; sys.exit(3)"), 0.01, 1)]
    monkeypatch.setattr(gpu_window, "steps", lambda minutes: listed)
    assert main(["--minutes", "2", "--save", "w"]) == EngineError.exit_code
    told = json.loads((tmp_path / "results" / "w.json").read_text())
    assert [one["status"] for one in told["steps"]] == [DONE, FAILED]
    assert told["machine"]["target"] == "sm_90"
    (logs / "x-y.log").unlink()
    capsys.readouterr()
    listed[1] = Step("second", ("-c", "print(5)"), 0.01, 1)
    assert main(["--minutes", "2", "--save", "w"]) == 0
    assert not (logs / "x-y.log").exists(), "what was done ran again"
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == {"x y": DONE, "second": DONE}


def test_every_step_is_a_command_that_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(gpu_window.steps(12))
    names = [one.name for one in gpu_window.steps(12)]
    for place, one in enumerate(gpu_window.steps(12)):
        assert set(one.needs) <= set(names[:place]), "it would wait for a later step"
        assert one.least <= one.most
        first = one.words[0]
        file = f"{one.words[1].replace('.', '/')}.py" if first == "-m" else first
        assert (gpu_window.ROOT / file).is_file()


def test_options_of_every_step_are_understood() -> None:
    from benchmarks import kernel, latency
    from export import build_engines
    from ppcr.training import segmenter

    parsers = {
        "benchmarks/kernel.py": kernel.parser, "benchmarks/latency.py": latency.parser,
        "export/build_engines.py": build_engines.parser,
    }  # fmt: skip
    for one in gpu_window.steps(12):
        if one.words[0] in parsers:
            parsers[one.words[0]]().parse_args(one.words[1:])
        if one.words[:2] == ("-m", "ppcr.training.segmenter"):
            assert segmenter.parse(one.words[2:]).mllm == Path("runs/gpu-mllm/mllm")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--minutes", "0"], UsageError),
        (["--only", "nothing"], UsageError),
        (["--save", "a/b"], UsageError),
    ],
)
def test_bad_input_is_one_line(words: list[str], error: type[UsageError]) -> None:
    assert main(words) == error.exit_code


def test_without_a_gpu_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none() -> Gpu:
        raise EngineError("no NVIDIA driver")

    monkeypatch.setattr(gpu_window, "first_gpu", none)
    assert main([]) == EngineError.exit_code
    assert "this needs a GPU (--list" in capsys.readouterr().err
