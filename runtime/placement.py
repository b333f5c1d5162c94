"""Keeps the threads that an engine started off the processor of the thread that calls it.

Linux may wake such a thread on its caller's processor although another one is idle, and move one of the two
only when its balancer comes by, 4 ms later and more; the one that runs spins until the other has had a turn.
On a virtual machine of two processors that happened after most pauses of .05 s and more: a vision tower of
5 ms took 12, longer than with one thread. Here the sleeping threads are told where they may wake, just before
they are needed: on any processor but the caller's. Nobody is pinned to one processor; on one that others keep
busy they are no worse off than with the caller. Systems other than Linux are left alone.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import ParamSpec, TypeVar

_TASKS = Path("/proc/self/task")
_OWN_NAME = Path("/proc/thread-self/comm")
_numbers = count()

_Arguments = ParamSpec("_Arguments")
_Returned = TypeVar("_Returned")


def _find_sched_getcpu() -> Callable[[], int] | None:
    if not hasattr(os, "sched_setaffinity"):
        return None
    try:
        found: Callable[[], int] = ctypes.CDLL(None).sched_getcpu
    except (OSError, AttributeError):
        return None
    return found


_current_processor = _find_sched_getcpu()


class Helpers:
    """Threads that work for whoever calls `step_aside` first.

    Args:
        threads: their native ids. They may use what the thread that makes this object may use.
    """

    def __init__(self, threads: Iterable[int] = ()) -> None:
        self._threads = tuple(threads)
        self._left: int | None = None
        self._allowed = os.sched_getaffinity(0) if _current_processor else set[int]()

    def add(self, thread: int) -> None:
        """One more, which has just been started."""
        self._threads, self._left = (*self._threads, thread), None

    def step_aside(self) -> None:
        """Keep the threads off the processor of the thread that calls; 2 microseconds at most per thread.

        Nothing happens where there are more of them than other processors.
        """
        if not self._threads or _current_processor is None:
            return
        processor = _current_processor()
        if processor == self._left:
            return
        others = self._allowed - {processor}
        if len(others) < len(self._threads):
            return
        try:
            for thread in self._threads:
                os.sched_setaffinity(thread, others)
        except OSError:
            # A thread has ended, or this process may no longer use these processors: no more of this.
            self._threads = ()
        self._left = processor


class Background(ThreadPoolExecutor):
    """One thread beside the caller's, on another processor where there is one."""

    def __init__(self, name: str) -> None:
        self._helpers = Helpers()
        super().__init__(1, name, initializer=lambda: self._helpers.add(threading.get_native_id()))

    def submit(
        self, call: Callable[_Arguments, _Returned], /, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> Future[_Returned]:
        """As ThreadPoolExecutor's."""
        self._helpers.step_aside()
        return super().submit(call, *args, **kwargs)


@contextmanager
def started_threads() -> Iterator[list[int]]:
    """A list that holds, once the block is left, the native ids of the threads that it started.

    Threads inherit their creator's name. For the block's time this thread bears one that no other has, so
    that threads which others start meanwhile are not taken for its own.
    """
    found = list[int]()
    name = f"ppcr-{next(_numbers) % 10**8}"
    try:
        before = _OWN_NAME.read_text()
        _OWN_NAME.write_text(name)
    except OSError:  # no Linux, or one that shows or lets write none of this
        yield found
        return
    try:
        yield found
    finally:
        _OWN_NAME.write_text(before.strip())
        found += (int(task.name) for task in _TASKS.iterdir() if _name_of(task) == name)


def _name_of(task: Path) -> str | None:
    try:
        return (task / "comm").read_text().strip()
    except OSError:  # it has ended
        return None
