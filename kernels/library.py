"""Every Triton kernel by name. Importing this module imports Triton."""

from __future__ import annotations

from typing import Any

from kernels.fold import fold_tokens
from kernels.image_to_prompt import write_folded, write_heads
from kernels.prompt_to_image import merge, read_folded, read_heads
from kernels.token_blocks import attend_tokens, mlp_tokens

KERNELS: dict[str, Any] = {
    kernel.__name__: kernel
    for kernel in (
        fold_tokens,
        read_folded,
        read_heads,
        merge,
        write_folded,
        write_heads,
        attend_tokens,
        mlp_tokens,
    )  # fmt: skip
}
