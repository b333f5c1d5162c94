"""Where prompts lie, apart from a mask decoder that computes in bfloat16: a graph of its own, in float32.

Boxes and points enter the decoder as sines of angles that grow with their coordinates. In bfloat16 a
coordinate is off by up to two of a thousand pixels, and its largest angles by a radian. OpenVINO computes
either a whole graph in bfloat16 or none of it, so the graph is cut behind the sines.
"""

from __future__ import annotations

from typing import Any

from runtime.openvino_cut import inputs_of
from runtime.openvino_library import Model, float32, make_model
from runtime.openvino_library import operators as op

_ANGLES = ("Sin", "Cos")


def cut_angles(model: Model) -> Model | None:
    """Take the sines and cosines of what ``model`` is given out of it; they become inputs, ``sine_0`` and on.

    Answers the graph from those of the inputs that they need to outputs of these names; None where ``model``
    has no angles, which leaves it as it was.
    """
    source = model.clone()
    theirs, ours = _sines(source), _sines(model)
    if not ours:
        return None
    needed = inputs_of(theirs)
    outputs, inputs = [], []
    for index, (sine, cut) in enumerate(zip(theirs, ours, strict=True)):
        name = f"sine_{index}"
        sine.output(0).set_names({name})
        outputs.append(op.result(sine.output(0)))
        given = op.parameter(cut.get_output_partial_shape(0), float32, name=name)
        cut.output(0).replace(given.output(0))
        given.output(0).set_names({name})
        inputs.append(given)
    model.add_parameters(inputs)
    model.validate_nodes_and_infer_types()
    kept = [given for given in source.get_parameters() if given.get_friendly_name() in needed]
    return make_model(outputs, kept)


def _sines(model: Model) -> list[Any]:
    """In the same order for a graph and its clone."""
    return [node for node in model.get_ordered_ops() if node.get_type_name() in _ANGLES and inputs_of([node])]
