"""How a number of processors is shared among the graphs of a bundle."""

from __future__ import annotations

from dataclasses import dataclass

_BYTES_PER_THREAD = 32 << 20


@dataclass(frozen=True)
class Threads:
    """Threads of each graph; ``step`` are those of the decoder when it reads a single token."""

    vision: int
    decoder: int
    step: int
    image_encoder: int
    mask_decoder: int


def share_threads(threads: int, decoder_bytes: int) -> Threads:
    """Who gets how many of ``threads``.

    Image, blocks of tokens and masks are read with all of them. One step of a small decoder is over before a
    second thread has woken up: it gets another one only for every further 32 MB of weights. What the steps
    leave free is the image encoder's, which runs beside them.
    """
    step = min(threads, 1 + decoder_bytes // _BYTES_PER_THREAD)
    return Threads(threads, threads, step, max(1, threads - step), threads)
