"""Banks of different kinds under one router."""

import pytest
import torch

from turnout.errors import UsageError
from turnout.paths import Bank, Mixed, every
from turnout.types import Routing


def banks(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    made = [Bank(2, 8, 6, std=0.3, generator=generator), Bank(3, 8, 4, activation="gelu", std=0.3, generator=generator)]
    return [bank.to(dtype) for bank in made]


def routing(tokens=7):
    generator = torch.Generator().manual_seed(1)
    index_TK = torch.rand(tokens, 5, generator=generator).topk(2)[1]
    return Routing.from_topk(index_TK, torch.rand(tokens, 2, generator=generator).double(), num_experts=5)


def test_it_is_the_sum_of_every_expert_by_its_weight():
    mixed, r = Mixed(banks()), routing()
    x_TD = torch.randn(7, 8, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    y_TD = mixed(x_TD, r)
    want_TD = (r.dense()[..., None] * every(mixed, x_TD)).sum(1)
    torch.testing.assert_close(y_TD, want_TD, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(y_TD.square().sum(), [x_TD, *mixed.parameters()])
    want = torch.autograd.grad(want_TD.square().sum(), [x_TD, *mixed.parameters()])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_bank_without_entries_adds_nothing():
    mixed = Mixed(banks())
    none = Routing.from_topk(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1).double(), num_experts=5)
    x_TD = torch.randn(3, 8).double()
    first = Routing.from_topk(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1).double(), num_experts=2)
    assert torch.equal(mixed(x_TD, none), mixed.banks[0](x_TD, first))


def test_the_cost_is_that_of_the_banks():
    first, second = banks()
    assert Mixed([first, second]).cost(10, 20).params == first.cost(10, 8).params + second.cost(10, 12).params
    assert Mixed([first, second]).cost(10, 20).flops == first.cost(10, 8).flops + second.cost(10, 12).flops


def test_no_bank_is_refused():
    with pytest.raises(UsageError, match="banks"):
        Mixed([])
