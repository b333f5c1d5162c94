"""What a finished engine is made of, read from the builder's own messages: no GPU is needed for that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: (?P<reads>.*), Outputs: "
                    r"(?P<writes>.*), TacticName: (?P<kernel>[^,]*), StreamId: .*", re.DOTALL)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A layer of the finished engine: one launch, or a wait between streams.

    Attributes:
        kind: "gemm", "kgen" (generated), "runtime_fusion" (finished at load), "correlation", …
        reads, writes: names of tensors, constants included.
    """

    name: str
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    @property
    def piece(self) -> int:
        """Which separately compiled piece of the engine it belongs to: one for each optimization profile."""
        found = re.search(r"_myl(\d+)_\d+$", self.name)
        return int(found[1]) if found else 0

    @property
    def runs(self) -> bool:
        """Whether it is a launch: not a computation of shapes on the host, nor an order between streams."""
        return self.kind not in ("shape_call", "signal", "wait")

    @property
    def is_attention(self) -> bool:
        """Whether it is a whole attention: both products and the softmax between them."""
        return "mha" in self.name


@dataclass(frozen=True)
class Built:
    """An engine that was built.

    Attributes:
        flavour, version: of the library. bytes: size of the engine.
        native: layers of the network that TensorRT has of its own, with their number.
        kernels: the final layer list.
        activation_bytes, weight_bytes: memory that the engine will take on the GPU.
        seconds, peak_bytes: that the build took, and the most memory its process held.
    """

    flavour: str
    version: str
    bytes: int
    native: dict[str, int]
    kernels: tuple[Kernel, ...]
    activation_bytes: int
    weight_bytes: int
    seconds: float = 0.0
    peak_bytes: int = 0

    def piece(self, number: int) -> tuple[Kernel, ...]:
        """The launches of one piece."""
        return tuple(kernel for kernel in self.kernels if kernel.runs and kernel.piece == number)

    @property
    def pieces(self) -> tuple[int, ...]:
        return tuple(sorted({kernel.piece for kernel in self.kernels}))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Built:
        kernels = tuple(
            Kernel(k["name"], k["kind"], tuple(k["reads"]), tuple(k["writes"])) for k in data["kernels"]
        )
        return cls(**{**data, "kernels": kernels})


def cache_is_in_place(built: Built, layers: int) -> bool:
    """Whether a decoder's engine writes its KV cache where it lies: nothing reads an old cache to copy it."""
    for number in built.pieces:
        kernels = built.piece(number)
        for name in (f"{kind}_cache" for kind in "kv"):
            for layer in range(layers):
                old, new = f"{name}_{layer}", f"{name}_out_{layer}"
                writers = [kernel for kernel in kernels if new in kernel.writes]
                copied = any(old in (*kernel.reads, *kernel.writes) for kernel in kernels)
                if copied or len(writers) != 1 or new not in writers[0].reads:
                    return False
    return True


def read_kernels(text: str) -> list[Kernel]:
    """The rows of the builder's message "Layers:"; tensors of the engine follow, indented."""
    found = []
    # A second optimization profile says so in the name of every tensor.
    for row in re.split(r"\n(?=Name: )", re.sub(r" \[profile \d+\]", "", text))[1:]:
        match = _LAYER.match(row)
        if match:
            reads, writes = (
                tuple(re.findall(r"\{ Name: ([^,]+),", match[side])) for side in ("reads", "writes")
            )
            found.append(Kernel(match["name"], match["type"], reads, writes))
    return found
