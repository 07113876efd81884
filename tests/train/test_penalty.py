"""What a router asks to be minimised beside the loss, and how many tokens it is told of."""

import dataclasses
import types

import pytest
import torch
from stand_in import EXPERTS, Tiny, tiny_config
from test_step import batch, stepped
from torch import nn

from turnout.types import Routing


class Asking(nn.Module):
    """One expert for all; asks for the mean of its scores' squares, and counts its tokens."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, 16, generator=torch.Generator().manual_seed(5)))
        self.told = []

    def forward(self, x_TD, *, generator=None):
        logit_TE = x_TD.detach() @ self.weight.t()
        index_T1 = torch.zeros(len(x_TD), 1, dtype=torch.int64)
        routing = Routing.from_topk(index_T1, torch.ones(len(x_TD), 1), num_experts=EXPERTS)
        return dataclasses.replace(routing, penalty=logit_TE.square().sum(1).mean())

    def after_step(self, load_E, *, num_tokens):
        self.told.append((load_E.tolist(), num_tokens))


def asking():
    model = Tiny()
    model.drop.p, model.router = 0.0, Asking()
    model.routers = [model.router]
    return model


def test_accumulation_equals_one_large_batch():
    """Whatever the number of tokens: the mean is over the step's, here 2 x 2 x 16."""
    first, second = batch(0), batch(1)
    both = types.SimpleNamespace(
        id_BS=torch.cat([first.id_BS, second.id_BS]), target_BS=torch.cat([first.target_BS, second.target_BS])
    )
    two, one = asking(), asking()
    a = stepped(two, tiny_config(aux_weight=0.0, z_weight=0.0, accumulate=2, clip=None), first, second)
    b = stepped(one, tiny_config(aux_weight=0.0, z_weight=0.0, accumulate=1, clip=None), both)
    torch.testing.assert_close(torch.tensor(a.window.means()), torch.tensor(b.window.means()))
    assert a.window.means()[3] > 1
    for p, q in zip(two.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert two.router.told == one.router.told == [([64, 0, 0, 0], 64)]


def test_the_gradient_is_that_of_the_loss_written_out():
    model, twin, one = asking(), asking(), batch(3)
    stepped(
        model,
        tiny_config(aux_weight=0.0, z_weight=0.0, accumulate=1, clip=None, penalty_weight=0.5, weight_decay=0.0),
        one,
    )
    x_TD = twin.norm(twin.embed(one.id_BS)).flatten(0, 1).detach()
    want = torch.autograd.grad(0.5 * (x_TD @ twin.router.weight.t()).square().sum(1).mean(), twin.router.weight)[0]
    moved = model.router.weight.detach() - twin.router.weight.detach()
    # Adam's first step goes against the sign of the gradient.
    assert torch.equal(moved.sign(), -want.sign()) and bool(moved.any())


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_without_a_weight_it_is_only_reported(weight):
    model, twin = asking(), asking()
    work = stepped(
        model,
        tiny_config(aux_weight=0.0, z_weight=0.0, accumulate=1, penalty_weight=weight, weight_decay=0.0),
        batch(3),
    )
    assert work.window.means()[3] > 1
    assert torch.equal(model.router.weight, twin.router.weight) == (weight == 0.0)
