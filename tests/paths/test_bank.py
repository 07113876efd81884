"""Banks and dense feed-forward layers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from turnout.errors import UsageError
from turnout.paths import Bank, FeedForward
from turnout.types import Routing


def routing(tokens=12, experts=4, k=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight_TK, index_TK = torch.rand(tokens, experts, generator=g).topk(k)
    return Routing.from_topk(index_TK, weight_TK, num_experts=experts)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_bank_with_all_experts_at_weight_one_is_the_sum_of_dense_layers(activation):
    bank = Bank(3, 8, 6, activation=activation, bias=True, std=0.3, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(bank.up_bias)
    torch.nn.init.normal_(bank.down_bias)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(5, 8)
    for e in range(3):
        dense = FeedForward(8, 6, activation=activation, bias=True)
        with torch.no_grad():
            dense.up_DH.copy_(bank.up_EDH[e])
            dense.down_FD.copy_(bank.down_EFD[e])
            dense.up_bias.copy_(bank.up_bias[e])
            dense.down_bias.copy_(bank.down_bias[e])
        expected += dense(x)
    torch.testing.assert_close(bank(x, Routing.from_dense(torch.ones(5, 3))), expected)


def test_swiglu_is_gate_first():
    dense = FeedForward(8, 6, std=0.5)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    gate, value = (x @ dense.up_DH).split(6, dim=1)
    torch.testing.assert_close(dense(x), (F.silu(gate) * value) @ dense.down_FD)


def test_every_backend_gives_the_same():
    bank, x = Bank(4, 16, 8, std=0.3), torch.randn(12, 16, generator=torch.Generator().manual_seed(2))
    expected = bank(x, routing(), backend="reference")
    for backend in ("auto", "sort", "grouped"):
        torch.testing.assert_close(bank(x, routing(), backend=backend), expected)


def test_state_dict_names_and_views():
    bank = Bank(3, 8, 4, bias=True)
    assert list(bank.state_dict()) == ["up", "down", "up_bias", "down_bias"]
    assert list(Bank(3, 8, 4).state_dict()) == ["up", "down"]
    with torch.no_grad():
        bank.up_EDH[1].zero_()
    assert not bank.weights().up_EDH[1].any() and bank.weights().up_EDH[0].any()
    assert bank.up.data_ptr() == bank.up_EDH.data_ptr()


def test_memory_is_in_the_order_of_the_shape():
    """As every optimizer, FSDP2 and files of weights want it."""
    bank = Bank(3, 8, 4)
    bank(torch.randn(12, 8), routing(experts=3)).sum().backward()
    for parameter in bank.parameters():
        assert parameter.is_contiguous() and parameter.grad.is_contiguous()


def test_start_values_are_those_of_all_versions():
    bank = Bank(2, 3, 4, generator=torch.Generator().manual_seed(0))
    found = torch.cat([bank.up[0, 1], bank.down[1, 0]])
    wanted = [0.0113686258, -0.0216904469, -0.0279719085, -0.0056981859, -0.0026688348, 0.0378582068, 0.0622208863]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", ["of the module, memory (in, out)", "of memory", "contiguous"])
@pytest.mark.parametrize("marked", [True, False])
def test_a_bank_that_was_pickled_with_other_memory(shape, marked):
    """As versions before this one made them, or sharded them; what else holds the parameter keeps it."""
    bank, x = Bank(4, 8, 6, std=0.3, generator=torch.Generator().manual_seed(0)), torch.randn(12, 8)
    old = bank.__dict__ | {"_parameters": dict(bank._parameters)}
    for name in ("up", "down"):
        memory = getattr(bank, name).detach().transpose(1, 2).contiguous()
        if shape != "contiguous":
            old["_parameters"][name] = nn.Parameter(memory if shape == "of memory" else memory.transpose(1, 2))
    if marked or shape == "of memory":
        old["turned"] = ("up", "down") if shape == "of memory" else ()
    else:
        del old["owners"]
    again = Bank.__new__(Bank)
    again.__setstate__(old)
    assert again.up is old["_parameters"]["up"]
    for each in (again, copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert all(
            p.is_contiguous() and torch.equal(p, q) for p, q in zip(each.parameters(), bank.parameters(), strict=True)
        )
        assert torch.equal(each(x, routing()), bank(x, routing())) and not hasattr(each, "turned")


def test_gradients_arrive_in_the_layout_of_the_parameter():
    """Otherwise accumulating them copies the whole bank."""
    bank = Bank(4, 8, 6)
    bank(torch.randn(12, 8), routing()).sum().backward()
    for parameter in bank.parameters():
        assert parameter.grad.stride() == parameter.stride()


def test_generator_makes_the_start_repeatable():
    a, b = (Bank(2, 4, 4, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a.up, b.up) and torch.equal(a.down, b.down)
    assert abs(float(Bank(8, 64, 64, std=0.5).up.detach().std()) - 0.5) < 0.02


def test_cost_counts_parameters_and_flops():
    bank = Bank(4, 8, 6)
    cost = bank.cost(tokens=10, entries=20)
    assert cost.params == sum(p.numel() for p in bank.parameters()) == 4 * (8 * 12 + 6 * 8)
    assert cost.params_active == cost.params // 2
    with FlopCounterMode(display=False) as counted:
        bank(torch.zeros(10, 8), routing(10), backend="reference")
    assert cost.flops == counted.get_total_flops()
    dense = FeedForward(8, 12)
    with FlopCounterMode(display=False) as counted:
        dense(torch.zeros(10, 8))
    assert dense.cost(10).flops == counted.get_total_flops() == cost.flops


def test_user_mistakes():
    with pytest.raises(UsageError, match="num_experts must be at least 1"):
        Bank(0, 8, 8)
    with pytest.raises(UsageError, match="hidden must be at least 1"):
        FeedForward(8, 0)
    with pytest.raises(UsageError, match="activation must be one of"):
        Bank(2, 8, 8, activation="swish")
