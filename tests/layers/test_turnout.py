"""The routed layer: shapes in and out, the policy's arguments, gradients to the policy."""

import pytest
import torch
from torch import nn

from turnout.errors import ShapeError
from turnout.layers import Turnout
from turnout.paths import Bank
from turnout.types import Routing


class Softmax(nn.Module):
    """A small router of the test's own; remembers what it was called with."""

    def __init__(self, width, num_experts):
        super().__init__()
        self.width, self.num_experts = width, num_experts
        self.weight = nn.Parameter(torch.randn(num_experts, width, generator=torch.Generator().manual_seed(0)))
        self.seen = {}

    def forward(self, x_TD, *, token_id_T=None, generator=None):
        self.seen = {"x": x_TD, "token_id_T": token_id_T, "generator": generator}
        weight_TK, index_TK = (x_TD.float() @ self.weight.t()).softmax(-1).topk(2)
        return Routing.from_topk(index_TK, weight_TK, num_experts=self.num_experts)


def layer(**options):
    return Turnout(Bank(4, 8, 6, std=0.3, generator=torch.Generator().manual_seed(1)), Softmax(8, 4), **options)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 1, 3, 8), (2, 0, 8)])
def test_any_leading_shape(shape):
    turnout, x = layer(), torch.randn(shape, generator=torch.Generator().manual_seed(2))
    routed = turnout(x)
    assert routed.output.shape == x.shape
    torch.testing.assert_close(routed.output.view(-1, 8), turnout(x.reshape(-1, 8)).output)
    assert routed.routing.num_tokens == x.numel() // 8


def test_backend_by_name():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(layer(backend="reference")(x).output, layer(backend="sort")(x).output)


def test_gradient_reaches_the_policy():
    turnout = layer()
    turnout(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))).output.square().sum().backward()
    assert turnout.policy.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in turnout.parameters())


def test_policy_sees_flat_tokens_ids_and_generator():
    turnout, g = layer(), torch.Generator()
    turnout(torch.zeros(2, 3, 8), token_id=torch.arange(6).view(2, 3), generator=g)
    assert turnout.policy.seen["x"].shape == (6, 8)
    assert turnout.policy.seen["token_id_T"].tolist() == list(range(6))
    assert turnout.policy.seen["generator"] is g


def test_ids_of_other_tokens_are_refused():
    with pytest.raises(ShapeError, match="token_id"):
        layer()(torch.zeros(2, 3, 8), token_id=torch.arange(6))
