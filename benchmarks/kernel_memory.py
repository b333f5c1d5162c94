"""Memory that the first block of the mask decoder takes for any number of expressions, counted without a GPU.

`kernels.launch` makes its tensors as on a GPU; the kernels themselves, which work on chip, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.kernel_cases import Case, inputs
from kernels.plan import Problem
from kernels.reference import PROMPT_TO_IMAGE


class Allocations(TorchDispatchMode):
    """Counts the bytes of every tensor that is made in its block: at least what is held at any moment."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.bytes = 0
        # All are kept, so that no two of them can have lain at the same place.
        self._kept = list(known)
        self._places = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and count what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage.data_ptr() not in self._places:
                self._places.add(storage.data_ptr())
                self._kept.append(tensor)
                self.bytes += storage.nbytes()
        return made


class _Idle:
    """A kernel, or all of them, which does nothing when it is launched."""

    def __getitem__(self, _: Any) -> _Idle:
        return self

    def __call__(self, *_: Any, **__: Any) -> None:
        pass


def read_bytes(problem: Problem) -> int:
    """Bytes that prompt to image takes beside its inputs and its result, in bfloat16, on 132 processors."""
    from kernels import launch

    case = Case(problem, PROMPT_TO_IMAGE, "bf16", masked=False, folded=True)
    given = inputs(case, 0, "cpu")
    with mock.patch.object(launch, "KERNELS", _Idle()), torch.no_grad():
        with Allocations([*given.sides, *given.weights]) as counted:
            out = launch.run(
                *given.sides, given.weights, direction=PROMPT_TO_IMAGE, heads=problem.heads, eps=1e-5,
                plan=case.plan(),
            )  # fmt: skip
    return counted.bytes - out.untyped_storage().nbytes()


def by_expressions(of: Callable[[int], Problem], counts: Sequence[int]) -> dict[str, int]:
    """`read_bytes` by number of expressions on one image."""
    return {str(count): read_bytes(of(count)) for count in counts}


def copies_of_image(found: dict[str, int], problem: Problem) -> float:
    """How many times the image's features each further expression costs, of bytes by number of expressions.

    1 or more would say that they are repeated; what does grow are the tokens between the kernels.
    """
    (few, least), *_, (many, most) = sorted((int(count), taken) for count, taken in found.items())
    return round((most - least) / ((many - few) * problem.cells * problem.dim * problem.itemsize), 4)
