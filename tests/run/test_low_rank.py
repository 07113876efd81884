"""Low-rank maps by a routing equal the obvious loop, in values and gradients, however few of them a token takes."""

import dataclasses
import importlib

import pytest
import torch

from turnout.errors import ShapeError
from turnout.run import low_rank, low_rank_merged, low_rank_reference
from turnout.types import LowRankWeights, Routing

WIDTH, OUT = 6, 4
room = importlib.import_module("turnout.run.low_rank")  # the function of that name hides it


def bank(ranks, seed=0, dtype=torch.float64, width=WIDTH) -> LowRankWeights:
    chance = torch.Generator().manual_seed(seed)
    border = [0]
    for rank in ranks:
        border.append(border[-1] + rank)
    down = torch.randn(border[-1], width, generator=chance, dtype=dtype, requires_grad=True)
    up = torch.randn(border[-1], OUT, generator=chance, dtype=dtype, requires_grad=True)
    return LowRankWeights(down, up, tuple(border), tuple(0.5 + n for n in range(len(ranks))))


def decision(tokens, paths, k, seed=0) -> tuple[Routing, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    index = torch.rand(tokens, paths, generator=chance).argsort(1)[:, :k]
    weight = torch.rand(tokens, k, generator=chance, dtype=torch.float64).requires_grad_()
    return Routing.from_topk(index, weight, num_experts=paths), weight


@pytest.fixture(params=[True, False], ids=["gathering", "whole"])
def ways(request, monkeypatch) -> bool:
    """Which of the two ways every size takes, where the costs would decide."""
    for name in ("_GATHER", "_GATHER_TRAINING"):
        monkeypatch.setattr(room, name, -1e9 if request.param else 1e9)
    return request.param


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 30, 2), (40, 30, 50), (3,)])
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("k", [1, 3])
def test_values_and_gradients_equal_the_loop(ways, ranks, tokens, k):
    k = min(k, len(ranks))
    weights, (routing, gate) = bank(ranks), decision(tokens, len(ranks), k)
    x = torch.randn(tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    leaves = (x, gate, weights.down_RD, weights.up_RO)
    ours, wanted = low_rank(x, routing, weights), low_rank_reference(x, routing, weights)
    assert ours.shape == (tokens, OUT)
    assert torch.allclose(ours, wanted, atol=1e-12)
    if tokens:
        ramp = torch.arange(ours.numel(), dtype=torch.float64).view_as(ours)
        for a, b in zip(
            torch.autograd.grad((ours * ramp).sum(), leaves, retain_graph=True),
            torch.autograd.grad((wanted * ramp).sum(), leaves, retain_graph=True),
            strict=True,
        ):
            assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(8, 8, 8), (1, 30, 2), (3, 3), (5,)])
@pytest.mark.parametrize("tokens", [0, 1, 7, 50])  # a call for all maps, and calls for each
@pytest.mark.parametrize("k", [1, 2])
@torch.no_grad()
def test_values_without_gradients_equal_the_loop(ways, ranks, tokens, k, dtype):
    weights, routing = bank(ranks, dtype=dtype, width=8), decision(tokens, len(ranks), min(k, len(ranks)))[0]
    routing = dataclasses.replace(routing, weight_R=routing.weight_R.float())
    x = torch.randn(tokens, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))
    wide = dataclasses.replace(weights, down_RD=weights.down_RD.double(), up_RO=weights.up_RO.double())
    ours, wanted = low_rank(x, routing, weights), low_rank_reference(x.double(), routing, wide)
    assert ours.dtype == dtype and ours.shape == (tokens, OUT)
    error = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert torch.allclose(ours.double(), wanted, rtol=error, atol=error * float(wanted.abs().max() if tokens else 1))


@pytest.mark.parametrize("gradients", [True, False])
def test_tokens_without_a_map_get_nothing(ways, gradients):
    weights, (whole, _) = bank((2, 3)), decision(5, 2, 1)
    routing = whole.keep(torch.tensor([True, False, True, False, False]))
    x = torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(gradients):
        ours, wanted = low_rank(x, routing, weights), low_rank_reference(x, routing, weights)
        empty = low_rank(x, whole.keep(torch.zeros(5, dtype=torch.bool)), weights)
    assert torch.allclose(ours, wanted, atol=1e-12) and not empty.any()
    assert int((ours.abs().sum(1) > 0).sum()) == 2


def test_few_maps_of_many_are_gathered_and_most_are_not():
    for ranks, k, trains, gathers in [
        ((16,) * 16, 1, False, True),
        ((16,) * 16, 8, False, False),
        ((16,) * 16, 1, True, False),
        ((16,) * 64, 1, True, True),
    ]:
        weights = bank(ranks)
        assert room.pays(decision(9, len(ranks), k)[0], weights, trains=trains) is gathers


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2)])
def test_merged_is_the_average_of_the_factors(parts, ranks):
    weights = bank(ranks)
    chance = torch.Generator().manual_seed(3)
    gate = torch.rand(2 * parts, 3, generator=chance, dtype=torch.float64)
    x = torch.randn(7, WIDTH, dtype=torch.float64, generator=chance)
    sequence = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    got = low_rank_merged(x, Routing.from_dense(gate), weights, sequence, parts=parts)
    for t in range(7):
        a, b = torch.zeros(max(ranks), WIDTH, dtype=torch.float64), torch.zeros(max(ranks), OUT, dtype=torch.float64)
        for n, scale in enumerate(weights.scale_N):
            rows = slice(weights.border_N[n], weights.border_N[n + 1])
            for p in range(parts):
                w = gate[int(sequence[t]) * parts + p, n]
                wide, out = (
                    slice(p * WIDTH // parts, (p + 1) * WIDTH // parts),
                    slice(p * OUT // parts, (p + 1) * OUT // parts),
                )
                a[: ranks[n], wide] += w * weights.down_RD[rows, wide]
                b[: ranks[n], out] += w * scale * weights.up_RO[rows, out]
        assert torch.allclose(got[t], (x[t] @ a.t()) @ b, atol=1e-12)
    even = torch.arange(2).repeat_interleave(3)
    assert torch.allclose(
        low_rank_merged(x[:6], Routing.from_dense(gate), weights, even, parts=parts)[4],
        low_rank_merged(x[4:5], Routing.from_dense(gate[parts:]), weights, torch.tensor([0]), parts=parts)[0],
        atol=1e-12,
    )


def test_sizes_that_do_not_fit_are_refused():
    weights, (routing, _) = bank((2, 2)), decision(3, 3, 1)
    x = torch.zeros(3, WIDTH, dtype=torch.float64)
    with pytest.raises(ShapeError, match="over 3 maps"):
        low_rank(x, routing, weights)
    with pytest.raises(ShapeError, match="divisor"):
        low_rank_merged(x, Routing.from_dense(torch.ones(5, 2)), weights, torch.tensor([0, 0, 0]), parts=5)


BAD = [("down", float("nan")), ("up", float("nan")), ("down", float("inf")), ("up", float("-inf"))]


@pytest.mark.parametrize(("factor", "value"), BAD)
@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2)])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("gradients", [True, False])
def test_an_adapter_that_a_token_does_not_take_cannot_reach_it(ways, factor, value, ranks, tokens, gradients):
    weights = bank(ranks)
    bad = (weights.down_RD if factor == "down" else weights.up_RO).detach()
    bad[weights.border_N[1], 1] = value  # of map 1, which only the last token takes
    index = torch.tensor([[0, 2]] * (tokens - 1) + [[0, 1]])
    gate = torch.rand(tokens, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    routing = Routing.from_topk(index, gate, num_experts=3)
    x = torch.randn(tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.set_grad_enabled(gradients):
        ours, wanted = low_rank(x, routing, weights), low_rank_reference(x, routing, weights)
    assert ours[:-1].isfinite().all()
    assert torch.allclose(ours, wanted, atol=1e-12, equal_nan=True)
    if gradients:
        leaves = (x, gate, weights.down_RD, weights.up_RO)
        for a, b in zip(
            torch.autograd.grad(ours[:-1].sum(), leaves, retain_graph=True),
            torch.autograd.grad(wanted[:-1].sum(), leaves, retain_graph=True),
            strict=True,
        ):
            assert torch.allclose(a, b, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("gradients", [True, False])
def test_finite_factors_that_overflow_reach_only_those_who_take_them(ways, gradients):
    down = torch.tensor([[1.0, 1.0], [3e4, 3e4]], dtype=torch.float16)
    weights = LowRankWeights(down, torch.ones(2, 3, dtype=torch.float16), (0, 1, 2), (1.0, 1.0))
    x = torch.full((4, 2), 2.0, dtype=torch.float16).requires_grad_()
    with torch.set_grad_enabled(gradients):
        y = low_rank(
            x, Routing.from_topk(torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), num_experts=2), weights
        )
    assert y.tolist() == [[4.0] * 3] * 4
    if gradients:
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[3.0, 3.0]] * 4


def test_where_nobody_looks_the_bad_rows_are_left_out_and_their_takers_are_nan():
    weights = bank((2, 2))
    weights.up_RO.detach()[2, 0] = float("inf")
    routing = Routing.from_dense(torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64))
    x = torch.randn(2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, wanted = room._whole(x, routing, weights, looked=False), low_rank_reference(x, routing, weights)
    assert torch.allclose(y[0], wanted[0]) and y[1].isnan().all()


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("factor", "value"), BAD)
@pytest.mark.parametrize("sequence_T", [[0, 0, 1, 1], [1, 0, 1, 1]], ids=["even", "ragged"])
def test_merging_leaves_out_what_a_sequence_does_not_take(parts, factor, value, sequence_T):
    weights, sequence_T = bank((2, 1, 2)), torch.tensor(sequence_T)
    clean = dataclasses.replace(weights, down_RD=weights.down_RD.clone(), up_RO=weights.up_RO.clone())
    (weights.down_RD if factor == "down" else weights.up_RO).detach()[2, 1] = value  # of map 1
    gate = torch.tensor([[0.2, 0.0, 0.8]] * parts + [[0.3, 0.3, 0.4]] * parts, dtype=torch.float64).requires_grad_()
    routing = Routing.from_dense(gate)
    x = torch.randn(4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = low_rank_merged(x, routing, weights, sequence_T, parts=parts)
    wanted = low_rank_merged(x, routing, clean, sequence_T, parts=parts)
    first = sequence_T == 0
    assert torch.allclose(ours[first], wanted[first], atol=1e-12)
    assert not ours[~first].isfinite().all(), "the other sequence takes it"
    got, right = (torch.autograd.grad(one[first].sum(), gate, retain_graph=True)[0][:parts] for one in (ours, wanted))
    assert torch.allclose(got[:, [0, 2]], right[:, [0, 2]], atol=1e-12)
