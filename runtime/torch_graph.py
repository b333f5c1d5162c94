"""Work of fixed shapes as a CUDA graph: warmed up, captured once, replayed in one launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

_T = TypeVar("_T")
_WARM_UP_RUNS = 3  # as torch's notes on CUDA graphs have it: libraries choose their kernels in the first


@dataclass(frozen=True)
class Recorded(Generic[_T]):
    """A graph and what its work returned: tensors that every replay writes again."""

    graph: torch.cuda.CUDAGraph
    result: _T

    def replay(self) -> _T:
        """Queue the work on the current stream."""
        self.graph.replay()
        return self.result


def record(work: Callable[[], _T], what: str) -> Recorded[_T] | None:
    """``work``, which reads and writes the same tensors each time, as a graph; None, and a warning, if not.

    It is run three times before, on a stream of its own, and what it wrote there stays.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP_RUNS):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # Another thread may be encoding an image meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = work()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        told = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"{what} runs without a CUDA graph: {told}", RuntimeWarning, stacklevel=3)
        return None
    return Recorded(graph, result)
