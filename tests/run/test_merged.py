"""Merged experts: the obvious loop, one-hot and linear special cases, and what it costs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from turnout.decide.token import SMEAR
from turnout.errors import ShapeError
from turnout.layers import Turnout, given
from turnout.paths import SSF, Bank, LoRA
from turnout.run import activate, execute, merged
from turnout.types import ExpertWeights, Routing


def bank(num_experts: int = 3, activation: str = "swiglu", seed: int = 0) -> Bank:
    generator = torch.Generator().manual_seed(seed)
    made = Bank(num_experts, 6, 5, activation=activation, bias=True, std=0.5, generator=generator)
    for bias in (made.up_bias, made.down_bias):
        torch.nn.init.normal_(bias, generator=generator)
    return made.double()


def tokens(count: int) -> torch.Tensor:
    return torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


RAGGED = torch.tensor([1, 0, 0, 1, 1, 3, 0, 3])  # no token of sequence 2


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("sequence_T", [RAGGED, torch.arange(4).repeat_interleave(2)], ids=["ragged", "even"])
def test_equals_the_obvious_loop_with_gradients(activation, sequence_T):
    paths, x_TD = bank(activation=activation), tokens(8)
    weight_BE = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    up, down = paths.up_EDH, paths.down_EFD

    def loop(x_TD, weight_BE):
        rows = []
        for x_D, b in zip(x_TD, sequence_T.tolist(), strict=True):
            w = weight_BE[b]
            hidden = x_D @ sum(w[e] * up[e] for e in range(3)) + sum(w[e] * paths.up_bias[e] for e in range(3))
            y = activate(hidden, activation) @ sum(w[e] * down[e] for e in range(3))
            rows.append(y + sum(w[e] * paths.down_bias[e] for e in range(3)))
        return torch.stack(rows)

    def fast(x_TD, weight_BE):
        return paths.merged(x_TD, Routing.from_dense(weight_BE), sequence_T)

    inputs = [x_TD.requires_grad_(), weight_BE, *paths.parameters()]
    pull = tokens(8)
    results = []
    for way in (loop, fast):
        y = way(x_TD, weight_BE)
        results.append([y, *torch.autograd.grad((y * pull).sum(), inputs)])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_one_expert_with_all_the_weight_is_that_expert():
    paths, x_TD = bank(), tokens(8)
    expert_B = torch.tensor([2, 0, 1, 2])
    routing = Routing.from_topk(expert_B[:, None], torch.ones(4, 1), num_experts=3)
    each = Routing.from_topk(expert_B[RAGGED][:, None], torch.ones(8, 1), num_experts=3)
    wanted = execute(x_TD, each, paths.weights(), backend="reference")
    assert torch.allclose(paths.merged(x_TD, routing, RAGGED), wanted, atol=1e-12)


def test_linear_experts_merged_are_the_ensemble_of_their_outputs():
    """With a fixed first product and no bend between, the map is linear in the parameters that differ."""
    generator = torch.Generator().manual_seed(3)
    down = torch.randn(3, 5, 6, dtype=torch.float64, generator=generator)
    up = torch.eye(6, dtype=torch.float64)[:, :5].expand(3, -1, -1)
    weights = ExpertWeights(up, down, down_bias_ED=down[:, 0], activation="relu")
    weight_BE = torch.rand(4, 3, dtype=torch.float64, generator=generator).softmax(1)
    x_TD = tokens(8).abs()  # relu changes nothing
    wanted = execute(x_TD, Routing.from_dense(weight_BE[RAGGED]), weights, backend="reference")
    assert torch.allclose(merged(x_TD, Routing.from_dense(weight_BE), weights, RAGGED), wanted, atol=1e-12)


def test_adapters_that_share_their_input_factor_merged_are_the_ensemble_too():
    paths = LoRA(6, 4, ranks=(2, 2, 2)).double()
    with torch.no_grad():
        paths.down.copy_(paths.down[:2].repeat(3, 1))
        paths.up.normal_(generator=torch.Generator().manual_seed(4))
    weight_BE = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).softmax(1)
    found = paths.merged(tokens(8), Routing.from_dense(weight_BE), RAGGED)
    assert torch.allclose(found, paths(tokens(8), Routing.from_dense(weight_BE[RAGGED])), atol=1e-12)


@pytest.mark.parametrize("kind", ["bank", "lora"])
def test_a_token_costs_one_expert_however_many_there_are(kind):
    def flops(num_experts: int, each: int) -> int:
        paths = bank(num_experts) if kind == "bank" else LoRA(6, 6, ranks=(2,) * num_experts).double()
        routing = Routing.from_dense(torch.full((2, num_experts), 1 / num_experts, dtype=torch.float64))
        with FlopCounterMode(display=False) as counter:
            paths.merged(tokens(2 * each), routing, torch.arange(2).repeat_interleave(each))
        return counter.get_total_flops()

    per_token = [(flops(n, 300) - flops(n, 100)) / 400 for n in (1, 2, 32)]
    assert per_token == [2 * 6 * 15 if kind == "bank" else 2 * 2 * 12] * 3
    assert flops(32, 0) == 2 * 2 * 32 * ((6 * 10 + 10 + 5 * 6 + 6) if kind == "bank" else 2 * 12)  # the averaging


def test_a_layer_of_experts_takes_a_router_of_sequences():
    torch.manual_seed(0)
    layer = Turnout(Bank(3, 6, 5, bias=True, std=0.5), SMEAR(6, 3, gain=1.0, std=1.0)).eval()
    x_BSD = torch.randn(2, 5, 6)
    alone = layer(x_BSD[:1, :3])
    mask_BS = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    with given(mask_BS=mask_BS):
        routed = layer(x_BSD)
    assert routed.routing.num_tokens == 2 and routed.output.shape == x_BSD.shape
    assert torch.allclose(routed.output[:1, :3], alone.output, atol=1e-6), "padding must not change the merged expert"


def test_sizes_that_do_not_fit_are_refused():
    paths = bank()
    routing = Routing.from_dense(torch.ones(4, 2, dtype=torch.float64))
    with pytest.raises(ShapeError, match="over 3"):
        paths.merged(tokens(8), routing, RAGGED)


@pytest.mark.parametrize("sequence_T", [RAGGED, torch.arange(4).repeat_interleave(2)], ids=["ragged", "even"])
@pytest.mark.parametrize("name", ["up", "down", "up_bias", "down_bias"])
def test_an_expert_that_a_sequence_does_not_take_cannot_reach_it(sequence_T, name):
    paths, x_TD = bank(), tokens(8)
    weight_BE = torch.tensor([[0.5, 0.5, 0.0]] * 3 + [[0.2, 0.3, 0.5]], dtype=torch.float64).requires_grad_()
    wanted = merged(x_TD, Routing.from_dense(weight_BE), paths.weights(), sequence_T).detach()
    getattr(paths, name).data[2].fill_(float("nan"))
    ours = merged(x_TD, Routing.from_dense(weight_BE), paths.weights(), sequence_T)
    free = sequence_T != 3
    assert torch.allclose(ours[free], wanted[free]) and ours[~free].isnan().all()
    (gradient,) = torch.autograd.grad(ours[free].sum(), weight_BE)
    assert gradient[:3].isfinite().all()


def test_a_pool_of_scales_leaves_out_what_a_sequence_does_not_take():
    pool = SSF(2, 3)
    pool.scale.data[1], pool.shift.data[1] = float("nan"), float("inf")
    y_TD = pool.merged(torch.ones(2, 3), Routing.from_dense(torch.tensor([[1.0, 0.0], [0.5, 0.5]])), torch.arange(2))
    assert y_TD[0].tolist() == [1.0] * 3 and y_TD[1].isnan().all()
