"""A graph of blocks in two parts, so that the first can be computed in bfloat16 and the second in float32.

OpenVINO computes either a whole graph in bfloat16 or none of it. What bfloat16 loses in a block near the end
is still there in the answer, what it loses in an early one is mostly averaged out by those after it.
"""

from __future__ import annotations

import re
from typing import Any

from runtime.openvino_library import Model, float32, make_model
from runtime.openvino_library import operators as op

BETWEEN = "between"
"""What the first part answers, and the second one is given."""


def cut(model: Model, blocks: re.Pattern[str], share: float) -> tuple[Model, Model] | None:
    """``model`` up to the block at ``share`` of its blocks, and from there on; None where there is none.

    ``blocks`` names their outputs, its first group their number. Every output of ``model`` is in the part
    that it needs, and each part has those of the inputs that it needs.
    """
    later = model.clone()
    between, given = _block_output(model, blocks, share), _block_output(later, blocks, share)
    if between is None or given is None:
        return None
    start = op.parameter(given.get_partial_shape(), float32, name=BETWEEN)
    given.replace(start.output(0))
    start.output(0).set_names({BETWEEN})
    end = op.result(between)
    end.output(0).set_names({BETWEEN})
    first, second = [end], []
    for early, late in zip(model.get_results(), later.get_results(), strict=True):
        if BETWEEN in inputs_of([late]):
            second.append(late)
        else:
            first.append(early)
    return _part(first, model.get_parameters()), _part(second, [start, *later.get_parameters()])


def inputs_of(nodes: list[Any]) -> set[str]:
    """Names of the graph's inputs that any of ``nodes`` depends on."""
    found, seen, left = set(), set(), list(nodes)
    while left:
        one = left.pop()
        name = one.get_friendly_name()
        if name not in seen:
            seen.add(name)
            if one.get_type_name() == "Parameter":
                found.add(name)
            left += [source.get_source_output().get_node() for source in one.inputs()]
    return found


def _part(results: list[Any], inputs: list[Any]) -> Model:
    needed = inputs_of(results)
    return make_model(results, [given for given in inputs if given.get_friendly_name() in needed])


def _block_output(model: Model, blocks: re.Pattern[str], share: float) -> Any:
    """The output of the last block before the cut; None where there is no such name."""
    found = {}
    for node in model.get_ordered_ops():
        for output in node.outputs():
            for name in output.get_names():
                if match := blocks.fullmatch(name):
                    found[int(match[1])] = output
    return found.get(int(share * len(found)) - 1)
