"""Factored experts equal the same experts written out, in values and in gradients, at the cost of the factors."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from turnout.errors import ShapeError, UsageError
from turnout.paths import FactoredBank
from turnout.run import factored, factored_reference
from turnout.types import FactoredWeights, Routing

sys.path.insert(0, str(Path(__file__).parents[1] / "contracts"))
from test_run import ROUTINGS

SIZES = {
    "own factors and rows": {"up_rank": 3, "down_rank": 2, "share": 1, "up_rows": 9, "down_rows": 5},
    "one factor for all": {"up_rank": 5, "down_rank": 4, "share": 100},
    "pairs, bias": {"up_rank": 2, "down_rank": 3, "share": 2, "bias": True},
    "threes, rows, no gate": {"up_rank": 2, "down_rank": 1, "share": 3, "up_rows": 4, "down_rows": 3,
                              "activation": "gelu"},
    "rows alone": {"up_rank": 0, "down_rank": 0, "up_rows": 11, "down_rows": 7},
    "rows in up alone": {"up_rank": 2, "down_rank": 0, "share": 2, "up_rows": 5, "bias": True},
}  # fmt: skip


def bank(experts: int, sizes: dict, seed: int = 0, dtype: torch.dtype = torch.float64) -> FactoredBank:
    generator = torch.Generator().manual_seed(seed)
    made = FactoredBank(experts, 8, 6, std=0.5, generator=generator, **{**sizes, **_fewer(experts, sizes)})
    with torch.no_grad():
        for row, rows in ((made.up_row, experts * 6 * made.parts), (made.down_row, experts * 8)):
            row.copy_(torch.randperm(rows, generator=generator)[: len(row)].sort()[0])
        for bias in (made.up_bias, made.down_bias):
            if bias is not None:
                bias.normal_(generator=generator)
    return made.to(dtype)


def _fewer(experts: int, sizes: dict) -> dict[str, int]:
    """No more rows than one expert has, where there is one alone."""
    return {name: min(sizes.get(name, 0), experts * 6) for name in ("up_rows", "down_rows")}


def _tokens(routing: Routing, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(routing.num_tokens, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("make", ROUTINGS.values(), ids=ROUTINGS)
def test_it_equals_the_experts_written_out(make, sizes) -> None:
    routing = make()
    made, x_TD = bank(routing.num_experts, sizes), _tokens(routing).requires_grad_()
    weight_R = routing.weight_R.double().requires_grad_()
    routing = dataclasses.replace(routing, weight_R=weight_R)
    leaves = {"x": x_TD, "weight": weight_R, **dict(made.named_parameters())}
    found = []
    for run in (factored, factored_reference):
        y_TD = run(x_TD, routing, made.weights())
        if not y_TD.requires_grad:  # no token has an expert that does anything
            assert run is factored and not y_TD.any() and not factored_reference(x_TD, routing, made.weights()).any()
            return
        slope_TD = torch.linspace(-1, 1, y_TD.numel(), dtype=torch.float64).view_as(y_TD)
        found.append((y_TD, torch.autograd.grad((y_TD * slope_TD).sum(), list(leaves.values()), allow_unused=True)))
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, ours, theirs in zip(leaves, found[0][1], found[1][1], strict=True):
        zero = torch.zeros_like(leaves[name])
        torch.testing.assert_close(zero if ours is None else ours, zero if theirs is None else theirs, msg=name)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_bfloat16_and_autocast_come_near(sizes) -> None:
    routing = ROUTINGS["top-2"]()
    made, x_TD = bank(routing.num_experts, sizes, dtype=torch.float32), _tokens(routing, torch.float32)
    exact_TD = factored(x_TD, routing, made.weights())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(factored(x_TD, routing, made.weights()), exact_TD, rtol=0.1, atol=0.3)
    half_TD = factored(x_TD.bfloat16(), routing, made.bfloat16().weights())
    assert half_TD.dtype == torch.bfloat16
    torch.testing.assert_close(half_TD.float(), exact_TD, rtol=0.1, atol=0.3)


@pytest.mark.parametrize("share", [1, 4])
def test_what_it_takes_is_what_cost_says_and_less_than_whole_experts_take(share) -> None:
    routing = Routing.from_dense(torch.ones(20, 4))
    made = FactoredBank(4, 16, 12, up_rank=3, down_rank=2, share=share, up_rows=8, down_rows=4)
    x_TD = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counted:
        factored(x_TD, routing, made.weights())
    assert made.cost(20, 80).flops == counted.get_total_flops()
    with FlopCounterMode(display=False) as whole:
        factored_reference(x_TD, routing, made.weights())
    assert counted.get_total_flops() < 0.5 * whole.get_total_flops()
    shared = made.up_in.numel() + made.down_out.numel()
    if share == 4:  # once a token, whatever the number of experts that it takes
        assert made.cost(20, 80).flops - made.cost(20, 40).flops == made.cost(20, 40).flops - 2 * 20 * shared


def test_tokens_that_nobody_takes_are_zero_and_need_no_gradient() -> None:
    routing = Routing.from_entries(
        torch.tensor([0, 2]), torch.tensor([1, 0]), torch.ones(2), num_tokens=4, num_experts=3
    )
    made = bank(3, {"up_rank": 2, "down_rank": 2, "share": 3})
    y_TD = factored(_tokens(routing), routing, made.weights())
    assert not y_TD[[1, 3]].any() and y_TD[[0, 2]].any()


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_what_no_token_takes_has_a_gradient_of_zeros(sizes, tokens) -> None:
    """A process whose tokens are all padding, or all for other experts, reduces the same gradients as the others."""
    made = bank(6, sizes)
    routing = Routing.from_topk(torch.full((tokens, 1), 5), torch.ones(tokens, 1).double(), num_experts=6)
    x_TD = torch.zeros(tokens, 8, dtype=torch.float64, requires_grad=True)
    factored(x_TD, routing, made.weights()).sum().backward()
    # What has no numbers has no gradient either: FSDP2 takes none of an empty tensor.
    assert not [name for name, p in made.named_parameters() if (p.grad is None) != (p.numel() == 0)]


def test_user_mistakes() -> None:
    made = bank(3, {"up_rank": 2, "down_rank": 2})
    routing = ROUTINGS["top-2"]()
    with pytest.raises(ShapeError, match="33 tokens over 6 experts"):
        factored(_tokens(routing), routing, made.weights())
    few = Routing.from_dense(torch.ones(5, 3))
    with pytest.raises(ShapeError, match=r"be \(T, 8\)"):
        factored(torch.zeros(5, 7), few, made.weights())
    with pytest.raises(UsageError, match=r"torch.float32, torch.float64"):
        factored(torch.zeros(5, 8), few, made.weights())


def test_sizes() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    weights = FactoredWeights(
        None, None, None, None, none, torch.zeros(0, 8), none, torch.zeros(0, 6), num_experts=5, share=2
    )
    assert (weights.groups, weights.width, weights.hidden, weights.parts) == (3, 8, 6, 2)
