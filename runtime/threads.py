"""How a number of processors is shared among the graphs of a bundle."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ppcr.errors import UsageError

_BYTES_PER_THREAD = 32 << 20
_MOST = 256


@dataclass(frozen=True)
class Threads:
    """Threads of each graph; ``step`` are those of the decoder when it reads a single token."""

    vision: int
    decoder: int
    step: int
    image_encoder: int
    mask_decoder: int


def count_threads(wanted: int | None) -> int:
    """Processors to use: those asked for, by default all that this process may use.

    Raises:
        UsageError: fewer than 1, or so many that starting them would stop the machine.
    """
    processors = len(os.sched_getaffinity(0))
    most = max(processors, _MOST)
    if wanted is not None and not 1 <= wanted <= most:
        raise UsageError(f"threads must be 1 to {most}, not {wanted}")
    return wanted or processors


def share_threads(threads: int, decoder_bytes: int) -> Threads:
    """Who gets how many of ``threads``.

    Image, blocks of tokens and masks are read with all of them. One step of a small decoder is over before a
    second thread has woken up: it gets another one only for every further 32 MB of weights. What the steps
    leave free is the image encoder's, which runs beside them.
    """
    step = min(threads, 1 + decoder_bytes // _BYTES_PER_THREAD)
    return Threads(threads, threads, step, max(1, threads - step), threads)
