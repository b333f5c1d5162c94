"""Conversations on OpenVINO: steps on its graphs, and blocks there as well or on onnxruntime."""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any, TypeVar

import numpy as np

from runtime.branches import Block
from runtime.host_branches import HostBranches
from runtime.host_context import Cache, HostContext, HostDecoder
from runtime.onnxruntime_context import OnnxContext
from runtime.onnxruntime_library import Session
from runtime.openvino_block import BlockGraphs
from runtime.openvino_library import Compiled
from runtime.openvino_step import ROWS, Step, StepGraphs
from runtime.positions import Int64Array
from runtime.session import Float32Array


class MixedContext(OnnxContext):
    """`runtime.session.Context`: one KV cache, read in blocks by onnxruntime and stepped by OpenVINO."""

    def __init__(
        self, decoders: tuple[Session, Session], host: HostDecoder, length: int, step: Compiled
    ) -> None:
        super().__init__(decoders, host, length)
        rows = {name: self._step[name] for name in ROWS}
        self._stepped = Step(step, rows, self._cache, self._logits)

    def _launch_step(self) -> None:
        self._stepped.run(int(self._at[0]))


class OpenVinoContext(HostContext):
    """`runtime.session.Context`: one KV cache, read and stepped by OpenVINO."""

    can_verify = can_branch = True

    def __init__(self, blocks: BlockGraphs, host: HostDecoder, length: int, step: Compiled) -> None:
        super().__init__(host, length)
        self._blocks = blocks
        rows = {name: self._step[name] for name in ROWS}
        self._stepped = Step(step, rows, self._cache, self._logits)

    def branch(self, count: int) -> OpenVinoBranches:
        """``count`` conversations that begin with what this one holds, on a cache of their own."""
        return OpenVinoBranches(self._blocks, self._host, self.snapshot(), count)

    def _launch_step(self) -> None:
        self._stepped.run(int(self._at[0]))

    def _read_block(
        self, ids: Int64Array, start: int, features: Float32Array | None, answers: Float32Array | None
    ) -> None:
        embeds, levels = self._embed(ids, features)
        end = start + len(ids)
        rows = {"inputs_embeds": embeds, "rope_cos": self._cos[start:end], "rope_sin": self._sin[start:end]}
        rows |= {f"deepstack_{level}": added for level, added in enumerate(levels)}
        wanted = self._logits if answers is None else answers
        last = np.arange(len(ids) - wanted.shape[1], len(ids))
        wanted[0] = self._blocks.read(rows, self._cache, start, self._mask[start:end, :end], last)


class OpenVinoBranches(HostBranches):
    """`runtime.session.Branches` on a cache of its own, read by OpenVINO."""

    def __init__(self, blocks: BlockGraphs, host: HostDecoder, trunk: Cache, count: int) -> None:
        super().__init__(host, trunk, count)
        self._blocks = blocks

    def _read(self, block: Block) -> Float32Array:
        nothing = np.zeros((len(block.ids), self._shapes.hidden), np.float32)
        rows: dict[str, Any] = {
            "inputs_embeds": self._host.embedding[block.ids],
            "rope_cos": self._tables.cos[block.positions],
            "rope_sin": self._tables.sin[block.positions],
            **{f"deepstack_{level}": nothing for level in range(self._shapes.deepstack)},
        }
        return self._blocks.read(rows, self._cache, block.start, block.mask[:, : block.end], block.last)


_Context = TypeVar("_Context", MixedContext, OpenVinoContext)


class Conversations:
    """Conversations that step on OpenVINO. Threads may share it.

    What those that ended were held in is used again: to make it takes longer than to read a token.

    Args:
        usual: tokens of the cache whose step is compiled at once.
    """

    def __init__(self, steps: StepGraphs, usual: int) -> None:
        self._steps = steps
        # By decoder and length of cache.
        self._ended: defaultdict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        steps.of(usual)

    def begin(
        self, kind: type[_Context], engine: Any, host: HostDecoder, length: int, longer: int
    ) -> tuple[_Context, bool]:
        """An empty conversation for ``length`` tokens, and whether it has the memory of one that ended.

        Then it is not the first one: conversations of ``longer`` tokens will come as well, and their step is
        compiled in the background.

        Args:
            engine: what reads its blocks.
        """
        ended = self._ended[id(host), length]
        try:
            state = ended.pop()
        except IndexError:
            context, used = kind(engine, host, length, self._steps.of(length)), False
        else:
            context, used = kind.__new__(kind), True
            context.__dict__ = state
            context.truncate(0)
            self._steps.foresee(longer)
        weakref.finalize(context, ended.append, vars(context))
        return context, used
