"""The prompt-feature attention as one torch op: gradients, rules, and how export and compile see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.op import prompt_feature_attention, using
from kernels.reference import DIRECTIONS, IMAGE_TO_PROMPT, PROMPT_TO_IMAGE, Weights
from ppcr.model.layers import Norm
from ppcr.model.mask_decoder import PromptFeatureAttention
from tests.test_kernels import double_case


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "ragged"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_op_equals_reference_and_has_its_gradients(direction: str, masked: bool) -> None:
    given, settings = double_case(direction, masked=masked)
    leaves = [t.clone().requires_grad_() for t in (*given.sides, *given.weights)]
    if given.after is not None:
        settings["after"] = given.after.clone().requires_grad_()
        leaves.append(settings["after"])
    (x, x_position, y, y_position), weights = leaves[:4], Weights(*leaves[4:14])
    found = {}
    for mode in ("off", "op"):
        with using(mode):
            out = prompt_feature_attention(x, x_position, y, y_position, weights, **settings)
        direction_of_change = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        gradients = torch.autograd.grad(out, leaves, direction_of_change)
        found[mode] = (out.detach(), *gradients)
        assert all(t.isfinite().all() for t in found[mode])
    for got, wanted in zip(found["op"], found["off"], strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_op_keeps_the_rules_of_custom_ops(direction: str) -> None:
    given, settings = double_case(direction, masked=True)
    arguments = (*given.sides, *given.weights, given.mask, given.after, direction, 2, 1e-5)
    utilities = "test_schema", "test_autograd_registration", "test_faketensor"
    torch.library.opcheck(torch.ops.ppcr.prompt_feature_attention.default, arguments, test_utils=utilities)
    assert settings["heads"] == 2


def test_wrong_names_are_refused() -> None:
    given, _ = double_case(PROMPT_TO_IMAGE, masked=False)
    x = given.sides[0]
    with pytest.raises(ValueError, match="no direction 'sideways'"):
        prompt_feature_attention(x, x, x, x, given.weights, direction="sideways", heads=2)
    with pytest.raises(ValueError, match="no kernel mode 'on'"), using("on"):
        pass


class Block(nn.Module):
    """One attention of the mask decoder."""

    def __init__(self, direction: str) -> None:
        super().__init__()
        self.attention, self.norm = PromptFeatureAttention(32, 2, 16, direction), Norm(32)

    def forward(self, x: Tensor, x_position: Tensor, y: Tensor, y_position: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x_position, y, y_position, self.norm)
        return out


@pytest.mark.parametrize("mode", ["op", "auto"])
def test_export_sees_the_op_where_it_is_used(mode: str) -> None:
    x, y = torch.randn(1, 3, 5, 32), torch.randn(1, 1, 11, 32)
    given = x, torch.randn_like(x), y, torch.randn(11, 32)
    count = torch.export.Dim("count", min=2, max=64)
    shapes = {"x": {1: count}, "x_position": {1: count}, "y": None, "y_position": None}
    module = Block(PROMPT_TO_IMAGE).eval()
    with using(mode), torch.no_grad():
        program = torch.export.export(module, given, dynamic_shapes=shapes)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("ppcr.prompt_feature_attention.default") == (mode == "op")
    more = torch.randn(1, 7, 5, 32)
    torch.testing.assert_close(
        program.module()(more, more, y, given[3]), module(more, more, y, given[3]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_torch_compile_sees_one_node_and_computes_the_same(direction: str) -> None:
    tokens, image = torch.randn(1, 3, 5, 32), torch.randn(1, 1, 11, 32)
    given = [tokens, torch.randn_like(tokens), image, torch.randn(11, 32)]
    if direction == IMAGE_TO_PROMPT:
        given = given[2:] + given[:2]
    module, targets = Block(direction).eval(), list[str]()

    def noting(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with using("op"), torch.no_grad():
        found = torch.compile(module, backend=noting, fullgraph=True)(*given)
    assert sum("prompt_feature_attention" in target for target in targets) == 1
    with using("off"), torch.no_grad():
        torch.testing.assert_close(found, module(*given), rtol=1e-5, atol=1e-5)
