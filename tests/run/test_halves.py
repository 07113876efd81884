"""Backward passes in halves: both together are the whole, to the bit."""

import pytest
import torch
from torch import nn

from turnout.run.blocks.block_parts import Graph
from turnout.run.blocks.halves import Owed
from turnout.run.product import linear


class Net(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(rows)
        self.first = nn.Parameter(torch.randn(5, 4, generator=make))
        self.bias = nn.Parameter(torch.randn(5, generator=make))
        self.scale = nn.Parameter(torch.randn(5, generator=make))
        self.stack = nn.Parameter(torch.randn(3, 6, 5, generator=make))
        self.fixed = nn.Parameter(torch.randn(6, 6, generator=make), requires_grad=False)

    def forward(self, x: torch.Tensor, owed: Owed) -> torch.Tensor:
        hidden = torch.tanh(linear(x, self.first, self.bias)) * self.scale
        hidden = owed.linear(hidden, self.stack, None, 1)
        # A matrix that is made of a parameter, and one that is not trained, have no gradient to put off.
        return linear(linear(hidden, self.fixed), self.fixed * self.scale[0])


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_two_halves_are_the_whole(rows: int) -> None:
    net, x = Net(rows), torch.randn(2, rows, 4, generator=torch.Generator().manual_seed(rows + 1))
    whole, slope = x.clone().requires_grad_(), torch.randn(2, rows, 6)
    plain = torch.tanh(linear(whole, net.first, net.bias)) * net.scale
    plain = linear(linear(plain, net.stack[1]), net.fixed)
    linear(plain, net.fixed * net.scale[0]).backward(slope)
    trained = [p for p in net.parameters() if p.requires_grad]
    gradient = {p: torch.zeros_like(p) for p in trained}
    graph = Graph(lambda owed, x: (net(x, owed),), x)
    (of_x,) = graph.back((slope,), gradient)
    assert torch.equal(of_x, whole.grad)
    assert len(graph.owed) == 2
    assert not gradient[net.first].any() and not gradient[net.stack].any()
    graph.owed.pay(gradient)
    assert len(graph.owed) == 0
    graph.owed.pay(gradient)  # nothing is paid twice
    for parameter in trained:
        assert torch.equal(gradient[parameter], parameter.grad if rows else torch.zeros_like(parameter))


def test_a_first_product_owes_its_weight_though_its_input_has_no_gradient() -> None:
    weight, owed = nn.Parameter(torch.ones(2, 3)), Owed()
    with owed.deferring():
        y = linear(torch.ones(4, 3), weight)
    y.sum().backward()
    gradient = {weight: torch.zeros_like(weight)}
    owed.pay(gradient)
    assert gradient[weight].tolist() == [[4.0] * 3] * 2 and weight.grad is None


def test_nothing_is_put_off_outside_nor_without_gradients() -> None:
    weight, owed = nn.Parameter(torch.ones(2, 3)), Owed()
    with owed.deferring(), torch.no_grad():
        linear(torch.ones(4, 3), weight)
    linear(torch.ones(4, 3), weight).sum().backward()
    assert weight.grad is not None and len(owed) == 0
