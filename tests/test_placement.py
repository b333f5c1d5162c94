"""An engine's threads keep off their caller's processor, and nobody else's threads are touched."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from runtime import placement
from runtime.onnxruntime_library import Session, open_graph
from runtime.placement import Background, Helpers, started_threads

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two processors",
)


class Sleeper:
    """A thread that waits until it is told to end; ``native_id`` as the system has it."""

    def __init__(self) -> None:
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._end.wait, daemon=True)
        self._thread.start()
        assert self._thread.native_id is not None
        self.native_id = self._thread.native_id

    def end(self) -> None:
        self._end.set()
        self._thread.join()
        while Path(f"/proc/self/task/{self.native_id}").exists():
            pass


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    made = Sleeper()
    yield made
    made.end()


@pytest.fixture
def processors() -> Iterator[set[int]]:
    """What this thread may use; whatever a test does to that is undone."""
    allowed = os.sched_getaffinity(0)
    yield allowed
    os.sched_setaffinity(0, allowed)


def test_helpers_leave_the_processor_of_the_caller(sleeper: Sleeper, processors: set[int]) -> None:
    helpers = Helpers([sleeper.native_id])
    for processor in [*processors, *processors]:
        os.sched_setaffinity(0, {processor})
        helpers.step_aside()
        assert os.sched_getaffinity(sleeper.native_id) == processors - {processor}
        assert os.sched_getaffinity(0) == {processor}


def test_more_helpers_than_other_processors_stay_where_they_are(processors: set[int]) -> None:
    sleepers = [Sleeper() for _ in processors]
    Helpers(one.native_id for one in sleepers).step_aside()
    assert all(os.sched_getaffinity(one.native_id) == processors for one in sleepers)
    for one in sleepers:
        one.end()


def test_a_helper_that_has_ended_is_no_error(processors: set[int]) -> None:
    sleeper = Sleeper()
    helpers = Helpers([sleeper.native_id])
    sleeper.end()
    for processor in processors:
        os.sched_setaffinity(0, {processor})
        helpers.step_aside()


def test_systems_that_cannot_tell_the_processor_are_left_alone(
    sleeper: Sleeper, processors: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "_current_processor", None)
    Helpers([sleeper.native_id]).step_aside()
    assert os.sched_getaffinity(sleeper.native_id) == processors


def test_threads_are_told_from_those_that_others_start_meanwhile() -> None:
    begin, begun = threading.Event(), threading.Event()
    others, own = list[Sleeper](), list[Sleeper]()

    def start_one() -> None:
        begin.wait()
        others.append(Sleeper())
        begun.set()

    bystander = threading.Thread(target=start_one)
    bystander.start()
    before = Path("/proc/thread-self/comm").read_text()
    with started_threads() as found:
        own += [Sleeper(), Sleeper()]
        begin.set()
        begun.wait()
    bystander.join()
    assert sorted(found) == sorted(one.native_id for one in own)
    assert Path("/proc/thread-self/comm").read_text() == before
    for one in (*own, *others):
        one.end()


def test_threads_are_not_looked_for_where_names_cannot_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_OWN_NAME", Path("/proc/no such file"))
    with started_threads() as found:
        Sleeper().end()
    assert found == []


def test_a_graph_s_threads_step_aside_and_its_answers_stay(tmp_path: Path, processors: set[int]) -> None:
    side = 96
    weights = np.random.default_rng().standard_normal((side, side)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [side, side])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    path = tmp_path / "product.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    given = np.random.default_rng().standard_normal((side, side)).astype(np.float32)
    with started_threads() as none:
        alone = open_graph(path, 1)
    assert none == []
    session = open_graph(path, 2)
    assert isinstance(session, Session)
    (worker,) = session._helpers._threads
    expected = alone.run(None, {"x": given})[0]
    for processor in processors:
        os.sched_setaffinity(0, {processor})
        np.testing.assert_allclose(session.run(None, {"x": given})[0], expected, rtol=1e-5, atol=1e-5)
        assert os.sched_getaffinity(worker) == processors - {processor}


def test_the_background_works_on_another_processor(processors: set[int]) -> None:
    with Background("test") as background:
        background.submit(threading.get_native_id).result()
        for processor in processors:
            os.sched_setaffinity(0, {processor})
            assert background.submit(os.sched_getaffinity, 0).result() == processors - {processor}
