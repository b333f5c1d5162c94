"""What this machine moves and multiplies at most, measured: copies by working set, matrix products by type.

``rates.py DEVICE THREADS BYTES[,BYTES]`` prints one JSON line. Run in a fresh process with the rows' own
threads: numpy copies and onnxruntime multiplies on the CPU (torch for bfloat16), torch does both on a GPU.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: import from the repository root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

CPU, CUDA = "cpu", "cuda"
SIDE = {CPU: 1024, CUDA: 8192}
"""Rows and columns of the square matrices: large enough for the full rate, small enough for a second."""
_LEAST_S, _REPEATS = 0.2, 5
_SMALLEST, _LARGEST = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Rates:
    """Best of several repeats.

    Attributes:
        device: "cpu" or "cuda". threads: that took part on the CPU.
        copy: (bytes of the working set, bytes read and written per second), ascending.
        matrix: type -> operations per second, a multiplication and an addition counted as two.
    """

    device: str
    threads: int
    copy: tuple[tuple[int, float], ...]
    matrix: dict[str, float]

    def bandwidth(self, size: int) -> float:
        """Bytes per second for a working set of ``size`` bytes: the fastest measured at that or above."""
        return max(rate for held, rate in self.copy if held >= min(size, self.copy[-1][0]))

    def operations(self, precision: str) -> float:
        """Operations per second at ``precision``: the fastest of the types that it may compute in."""
        allowed = [rate for name, rate in self.matrix.items() if name in _MAY_USE.get(precision, ("fp32",))]
        return max(allowed or self.matrix.values())

    def to_json(self) -> dict[str, Any]:
        """JSON values; `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Rates:
        return cls(**{**value, "copy": tuple((int(size), float(rate)) for size, rate in value["copy"])})


# What is stored in four or eight bits is computed in whole numbers or in floating point.
_MAY_USE = {
    "fp32": ("fp32",),
    "fp16": ("fp32", "fp16"),
    "bf16": ("fp32", "bf16"),
    "fp8": ("fp32", "fp16", "bf16"),
    "int8": ("fp32", "fp16", "bf16", "int8"),
    "int4": ("fp32", "fp16", "bf16", "int8"),
}


def measured(device: str, threads: int, sizes: Sequence[int]) -> Rates:
    """Rates of this process's machine. sizes: working sets in bytes."""
    held = sorted({min(max(size, _SMALLEST), _LARGEST) for size in sizes} | {_LARGEST // 4})
    if device == CUDA:
        return Rates(device, threads, tuple((n, _copy_cuda(n)) for n in held), _matrix_cuda())
    with ThreadPoolExecutor(threads) as pool:
        copied = tuple((n, _copy_cpu(n, threads, pool)) for n in held)
    return Rates(device, threads, copied, _matrix_cpu(threads))


def _copy_cpu(size: int, threads: int, pool: ThreadPoolExecutor) -> float:
    """Each thread copies its own half-and-half share over and over: ``size`` bytes a round."""
    half = size // 2 // threads
    pairs = [(np.ones(half, np.uint8), np.zeros(half, np.uint8)) for _ in range(threads)]

    def copy(pair: tuple[Any, Any], rounds: int) -> None:
        for _ in range(rounds):
            np.copyto(pair[1], pair[0])

    rounds = max(1, (64 << 20) // size)
    seconds = _best(lambda: list(pool.map(lambda pair: copy(pair, rounds), pairs)))
    return 2.0 * half * threads * rounds / seconds


def _matrix_cpu(threads: int) -> dict[str, float]:
    found = {"fp32": _onnx_rate("fp32", threads), "int8": _onnx_rate("int8", threads)}
    bf16 = _bf16_rate(threads)
    return found if bf16 is None else {**found, "bf16": bf16}


def _onnx_rate(kind: str, threads: int) -> float:
    """A product with a constant matrix, as weights are, in onnxruntime."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    n, rng = SIDE[CPU], np.random.default_rng(0)
    if kind == "fp32":
        operator, given, out = "MatMul", TensorProto.FLOAT, TensorProto.FLOAT
        left, right = (rng.standard_normal((n, n), np.float32) for _ in range(2))
    else:
        operator, given, out = "MatMulInteger", TensorProto.UINT8, TensorProto.INT32
        left = rng.integers(0, 255, (n, n), np.uint8)
        right = rng.integers(-127, 127, (n, n), np.int8)
    graph = helper.make_graph(
        [helper.make_node(operator, ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", given, [n, n])],
        [helper.make_tensor_value_info("c", out, [n, n])],
        [numpy_helper.from_array(right, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return 2.0 * n**3 / _best(lambda: session.run(None, {"a": left}))


def _bf16_rate(threads: int) -> float | None:
    """Of torch, which has bfloat16 products where the processor has them; None without torch."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    n = SIDE[CPU]
    left, right = (torch.randn(n, n).to(torch.bfloat16) for _ in range(2))
    return 2.0 * n**3 / _best(lambda: left @ right)


def _copy_cuda(size: int) -> float:
    import torch

    half = size // 2
    source = torch.ones(half, dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    rounds = max(1, (1 << 30) // size)

    def body() -> None:
        for _ in range(rounds):
            target.copy_(source)
        torch.cuda.synchronize()

    return 2.0 * half * rounds / _best(body)


def _matrix_cuda() -> dict[str, float]:
    import torch

    n, found = SIDE[CUDA], {}
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    for name, dtype in kinds.items():
        left, right = (torch.randn(n, n, device=CUDA, dtype=dtype) for _ in range(2))

        def body(left: Any = left, right: Any = right) -> None:
            left @ right
            torch.cuda.synchronize()

        found[name] = 2.0 * n**3 / _best(body)
    return found


def _best(body: Callable[[], object]) -> float:
    """Seconds of the fastest of several repeats: whatever else runs only slows them."""
    body()
    fastest, spent = float("inf"), 0.0
    repeats = 0
    while repeats < _REPEATS or spent < _LEAST_S:
        start = time.perf_counter()
        body()
        taken = time.perf_counter() - start
        fastest, spent, repeats = min(fastest, taken), spent + taken, repeats + 1
    return fastest


def main(device: str, threads: str, sizes: str) -> int:
    """Print the rates as one JSON line."""
    found = measured(device, int(threads), [int(size) for size in sizes.split(",")])
    print(json.dumps(found.to_json()))
    return 0


if __name__ == "__main__":
    from ppcr.errors import run_cli

    sys.exit(run_cli(lambda: main(*sys.argv[1:])))
