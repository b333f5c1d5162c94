"""Attention as OpenVINO fuses it: the graph's own has an axis too many.

The segmenter keeps an axis for images before that for prompts, which has a length of one in the mask decoder.
OpenVINO makes one kernel of scores, softmax and weighted sum, the turning of heads included, where all of it
has four axes. With five, each is an operator of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.openvino_library import Model
from runtime.openvino_library import operators as op

_AXES = 5


def drop_image_axis(model: Model) -> int:
    """Write the attentions of ``model`` that have an image axis of one without it; how many there were."""
    count = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Softmax" and _has_image_axis(node.output(0)):
            count += _rewrite(node)
    return count


def _has_image_axis(value: Any) -> bool:
    first = value.get_partial_shape()[0] if _axes(value) == _AXES else None
    return first is not None and first.is_static and first.get_length() == 1


def _axes(value: Any) -> int:
    return len(value.get_partial_shape())


def _rewrite(softmax: Any) -> bool:
    scores, bias = softmax.input_value(0), None
    if scores.get_node().get_type_name() == "Add":
        scores, bias = scores.get_node().input_value(0), scores.get_node().input_value(1)
    users = list(softmax.output(0).get_target_inputs())
    # The weights are what the sum's first input is.
    sums = users[0].get_node() if len(users) == 1 and users[0].get_index() == 0 else softmax
    if {scores.get_node().get_type_name(), sums.get_type_name()} != {"MatMul"}:
        return False
    operands = [*_inputs(scores.get_node()), sums.input_value(1), *([] if bias is None else [bias])]
    if not all(_has_image_axis(one) or _axes(one) < _AXES for one in operands):
        return False
    weights = _product(scores.get_node(), [_without_axis(one) for one in _inputs(scores.get_node())])
    if bias is not None:
        weights = op.add(weights, _without_axis(bias))
    found = _product(sums, [op.softmax(weights, -1), _without_axis(sums.input_value(1))])
    # Heads are turned back within the kernel as well.
    after = [given.get_node() for given in sums.output(0).get_target_inputs()]
    if len(after) == 1 and (order := _order(after[0])):
        found, sums = op.transpose(found, _numbers([axis - 1 for axis in order[1:]])), after[0]
    sums.output(0).replace(op.unsqueeze(found, _numbers([0])).output(0))
    return True


def _without_axis(value: Any) -> Any:
    """``value`` without its image axis, dropped before heads are turned and scaled."""
    if _axes(value) < _AXES:  # it never had one: the same for all images and, where shorter still, prompts
        return value
    node = value.get_node()
    if order := _order(node):
        return op.transpose(_without_axis(node.input_value(0)), _numbers([axis - 1 for axis in order[1:]]))
    if node.get_type_name() == "Multiply":
        factor = node.input_value(1).get_node()
        if factor.get_type_name() == "Constant" and factor.data.size == 1:
            return op.multiply(_without_axis(node.input_value(0)), np.float32(factor.data.reshape(())))
    return op.squeeze(value, _numbers([0]))


def _order(node: Any) -> list[int]:
    """The order of axes of a transposition that leaves the first where it is; else none."""
    if node.get_type_name() != "Transpose" or node.input_value(1).get_node().get_type_name() != "Constant":
        return []
    order = [int(axis) for axis in node.input_value(1).get_node().data]
    return order if len(order) == _AXES and order[0] == 0 else []


def _inputs(node: Any) -> list[Any]:
    return [node.input_value(0), node.input_value(1)]


def _product(like: Any, inputs: list[Any]) -> Any:
    turned = like.get_attributes()
    return op.matmul(*inputs, turned["transpose_a"], turned["transpose_b"])


def _numbers(values: Sequence[int]) -> Any:
    return op.constant(np.array(values, np.int64))
