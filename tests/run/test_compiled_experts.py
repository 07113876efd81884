"""A layer of experts for few tokens, compiled: the values of ``reference`` for every activation, format and routing."""

import dataclasses

import pytest
import torch

from turnout.errors import ShapeError
from turnout.run import execute
from turnout.run.compiled.experts import experts_times, few_rows, suits_experts, suits_few_rows
from turnout.types import ExpertWeights, Routing
from turnout.types.packed import Packed
from turnout.types.weights import GATED

pytestmark = pytest.mark.usefixtures("compiled")

ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai", "gelu", "gelu_tanh", "relu", "silu")
OFF = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def decided(tokens: int, experts: int, k: int, dtype=torch.float32, seed: int = 0) -> Routing:
    score_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    weight_TK, index_TK = score_TE.topk(k)
    return Routing.from_topk(index_TK, weight_TK.to(dtype), num_experts=experts)


def bank(activation="swiglu", *, experts=8, width=24, hidden=20, dtype=torch.float32, bias=False, interleaved=False):
    g = torch.Generator().manual_seed(1)
    outs = hidden * (2 if activation in GATED else 1)
    up_EHD, down_EDF = torch.randn(experts, outs, width, generator=g), torch.randn(experts, width, hidden, generator=g)
    up_EHD, down_EDF = (up_EHD * 3 * width**-0.5).to(dtype), (down_EDF * hidden**-0.5).to(dtype)
    biases = [torch.randn(experts, n, generator=g).to(dtype) for n in (outs, width)] if bias else [None, None]
    up, down = up_EHD.transpose(1, 2), down_EDF.transpose(1, 2)
    return ExpertWeights(up, down, *biases, activation=activation, interleaved=interleaved)


def rows(tokens: int, width: int = 24, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(2)).to(dtype)


def check(x_TD, routing, weights, got=None) -> None:
    """Against the reference in double precision."""
    tensors = {each.name: getattr(weights, each.name) for each in dataclasses.fields(weights)}
    wide = {name: one.double() for name, one in tensors.items() if isinstance(one, torch.Tensor)}
    sure = dataclasses.replace(routing, weight_R=routing.weight_R.double())
    expected = execute(x_TD.double(), sure, dataclasses.replace(weights, **wide), backend="reference")
    if got is None:
        assert suits_few_rows(x_TD, routing, weights)
        got = few_rows(x_TD, routing, weights)
    assert got.dtype == x_TD.dtype and got.shape == x_TD.shape
    assert float((got.double() - expected).norm() / expected.norm()) < OFF[x_TD.dtype]


@pytest.mark.parametrize("dtype", OFF)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_dtype(activation, dtype):
    for tokens in (1, 3):
        for bias in (False, True):
            weights = bank(activation, dtype=dtype, bias=bias)
            check(rows(tokens, dtype=dtype), decided(tokens, 8, 2, dtype), weights)
    if activation in GATED:
        weights = bank(activation, dtype=dtype, bias=True, interleaved=True)
        check(rows(3, dtype=dtype), decided(3, 8, 2, dtype), weights)


@pytest.mark.parametrize("width, hidden", [(1, 1), (31, 33), (64, 96), (130, 70)])
def test_every_size(width, hidden):
    for tokens, experts, k in ((1, 3, 3), (5, 2, 1), (17, 4, 2), (64, 2, 2)):
        check(rows(tokens, width), decided(tokens, experts, k), bank(experts=experts, width=width, hidden=hidden))


def test_sigmoids_at_the_ends_of_the_scale():
    for activation in ACTIVATIONS:
        weights = bank(activation, experts=1)
        x_TD = rows(6) * torch.tensor([[1e-6], [1.0], [30.0], [300.0], [1e4], [0.0]])
        check(x_TD, decided(6, 1, 1), weights)
        x_TD[0, 0] = torch.nan
        got = few_rows(x_TD, decided(6, 1, 1), weights)
        assert got[0].isnan().all() and not got[1:].isnan().any()


def test_tokens_with_none_one_and_all_experts_and_none_at_all():
    mask_TE = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    routing = Routing.from_dense(torch.rand(4, 4, generator=torch.Generator().manual_seed(0)), mask_TE=mask_TE)
    weights = bank(experts=4, bias=True)
    check(rows(4), routing, weights)
    got = few_rows(rows(4), routing, weights)
    assert not got[0].any() and not got[3].any()
    for tokens in (0, 3):
        idle = Routing.from_dense(torch.zeros(tokens, 4))
        assert torch.equal(few_rows(rows(tokens), idle, weights), torch.zeros(tokens, 24))


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_token_that_takes_an_expert_several_times(tokens):
    # Wide enough for several parts: what one makes must not lie where rows wait for the next.
    weights, index_TK = bank(experts=3, hidden=200), torch.tensor([[1, 1, 2, 1]]).expand(tokens, -1)
    weight_TK = torch.rand(tokens, 4, generator=torch.Generator().manual_seed(3))
    check(rows(tokens), Routing.from_topk(index_TK, weight_TK, num_experts=3), weights)


def test_memory_of_any_order_and_experts_that_nobody_takes():
    weights, routing = bank(experts=16), decided(3, 16, 2)
    padded = torch.nn.functional.pad(weights.up_EDH.transpose(1, 2), (2, 3, 1, 0, 1, 0))[1:, 1:, 2:26]
    assert not padded.is_contiguous()
    idle_E = routing.load_E == 0
    padded[idle_E], down_EDF = torch.nan, weights.down_EFD.transpose(1, 2).clone()
    down_EDF[idle_E] = torch.nan
    got = few_rows(
        rows(24).t()[:3], routing, dataclasses.replace(weights, up_EDH=padded.transpose(1, 2), down_EFD=down_EDF.mT)
    )
    assert idle_E.any()
    check(rows(24).t()[:3], routing, weights, got)
    other = dataclasses.replace(weights, up_EDH=weights.up_EDH.contiguous())
    assert not suits_few_rows(rows(3), routing, other), "stored (in, out)"


def test_one_token_has_the_same_bits_alone_among_others_and_with_more_threads():
    before = torch.get_num_threads()
    for dtype in OFF:
        weights, x_TD = bank(dtype=dtype, width=70, hidden=150, bias=True), rows(13, 70, dtype)
        score_TE = torch.rand(13, 8, generator=torch.Generator().manual_seed(5))
        weight_TK, index_TK = score_TE.topk(3)
        try:
            found = []
            for count in (1, 2):
                torch.set_num_threads(count)
                found.append(few_rows(x_TD, Routing.from_topk(index_TK, weight_TK, num_experts=8), weights))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(*found)
        for t in (0, 5, 12):
            alone = Routing.from_topk(index_TK[t : t + 1], weight_TK[t : t + 1], num_experts=8)
            assert torch.equal(few_rows(x_TD[t : t + 1], alone, weights)[0], found[0][t])


def packed(shape: tuple[int, ...], *, bits: int, group: int, levels: bool, scale: torch.dtype, seed: int) -> Packed:
    g = torch.Generator().manual_seed(seed)
    low, high = (0, 16) if levels else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    value = torch.randint(low, high, shape, generator=g)
    size = torch.rand(*shape[:-1], shape[-1] // group, generator=g) * 4 / 2**bits
    table = torch.randn(16, generator=g).sort().values * 4 if levels else None
    return Packed.of(value, size.to(scale), group=group, bits=bits, levels=table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "bits, group, levels, scale",
    [
        (8, 0, False, torch.float32),
        (8, 32, False, torch.bfloat16),
        (4, 32, False, torch.float32),
        (4, 32, True, torch.float16),
        (4, 0, True, torch.float32),
    ],
)
def test_few_bits(bits, group, levels, scale, dtype):
    for width, hidden in ((64, 96), (70, 34) if group == 0 else (96, 32)):
        up = packed((6, 2 * hidden, width), bits=bits, group=group or width, levels=levels, scale=scale, seed=3)
        down = packed((6, width, hidden), bits=bits, group=group or hidden, levels=levels, scale=scale, seed=4)
        routing = decided(5, 6, 2, dtype)
        x_TD = rows(5, width, dtype)
        assert suits_experts(x_TD, routing, up, down)
        got = experts_times(x_TD, routing, up, down)
        weights = ExpertWeights(up.dequantised().mT, down.dequantised().mT)
        check(x_TD, routing, weights, got)
        for t in (0, 4):  # the bits of a token alone are those among others
            (mine,) = (routing.token_R == t).nonzero(as_tuple=True)
            alone = routing.keep(routing.token_R == t)
            assert len(mine) == 2 and torch.equal(experts_times(x_TD, alone, up, down)[t], got[t])


def test_groups_that_are_no_blocks_are_left_alone():
    up = packed((2, 8, 48), bits=4, group=16, levels=False, scale=torch.float32, seed=3)
    down = packed((2, 48, 4), bits=4, group=4, levels=False, scale=torch.float32, seed=3)
    assert not suits_experts(rows(1, 48), decided(1, 2, 1), up, down)


@pytest.mark.parametrize("token, offsets", [([0, 9], [0, 1, 2]), ([-1, 0], [0, 1, 2]), ([0, 0], [0, 2, 1])])
def test_a_routing_that_is_none_is_not_followed(token, offsets):
    weights = bank(experts=2)
    routing = Routing(torch.tensor(token), torch.ones(2), torch.tensor(offsets), 1)
    with pytest.raises(ShapeError):
        few_rows(rows(1), routing, weights)


def test_a_gate_far_below_lets_nothing_through():
    """Beyond what fp32 has exponents for, too: -1e38 sigmoid(-1e38) is no third."""
    routing = Routing.from_topk(torch.tensor([[0]]), torch.ones(1, 1), num_experts=1)
    weights = ExpertWeights(-torch.ones(1, 1, 1), torch.ones(1, 1, 1), activation="silu")
    assert few_rows(torch.tensor([[1e38]]), routing, weights).abs().item() < 1e-6
