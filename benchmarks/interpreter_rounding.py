"""Makes Triton's interpreter round as GPUs do.

Its conversion of float32 to bfloat16 cuts the last bits off (triton 3.7, `_convert_float` without a rounding
mode). Compiled kernels round to the nearest, ties to even (PTX ``cvt.rn``), which errs half as much: what the
interpreter finds would be the error of other kernels.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def round_to_nearest() -> None:
    """From now on, where this process runs kernels in the interpreter (``TRITON_INTERPRET=1``)."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    cut = interpreter._convert_float

    def convert(given: npt.NDArray[Any], source: Any, target: Any, mode: Any) -> npt.NDArray[Any]:
        if source == tl.float32 and target == tl.bfloat16:
            whole = torch.from_numpy(np.array(given, np.float32))
            return whole.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        answer: npt.NDArray[Any] = cut(given, source, target, mode)
        return answer

    interpreter._convert_float = convert
