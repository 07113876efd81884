import math

import pytest
import torch

from turnout.decide.token import GShard, TopK
from turnout.errors import UsageError

WIDTH = 16


def test_without_training_it_is_renormalised_top_2():
    ours, plain = GShard(WIDTH, 8, std=0.5).eval(), TopK(WIDTH, 8, top_k=2)
    plain.weight.data.copy_(ours.weight.data)
    x_TD = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(x_TD).dense(), plain(x_TD).dense())


def test_the_second_expert_is_kept_with_probability_twice_its_weight():
    router = GShard(2, 2).train()
    router.weight.data.copy_(torch.eye(2))
    for gap in (0.0, 1.0, 2.0, 4.0):
        x_TD = torch.tensor([[gap, 0.0]]).repeat(20_000, 1)
        second = 1 / (1 + math.exp(gap))
        routing = router(x_TD, generator=torch.Generator().manual_seed(0))
        assert int(routing.load_E[0]) == 20_000, "the first expert is always kept"
        assert float(routing.load_E[1]) / 20_000 == pytest.approx(min(1, 2 * second), abs=0.015)
        # A token that lost its second expert keeps the weight of its first.
        torch.testing.assert_close(routing.weight_R[:20_000].detach(), torch.full((20_000,), 1 - second))
        assert routing.wanted_E is None, "chance is no capacity: nothing was dropped"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("training", [False, True])
def test_capacity_takes_first_choices_before_second_ones(seed, training):
    """Against the paper's algorithm 2, token by token."""
    count, num_experts, factor = 40, 5, 0.7
    generator = torch.Generator().manual_seed(seed)
    router = GShard(WIDTH, num_experts, capacity_factor=factor, std=0.5, generator=generator).train(training)
    x_TD = torch.randn(count, WIDTH, generator=generator)
    routing = router(x_TD, generator=torch.Generator().manual_seed(7))
    chance = torch.rand(count, generator=torch.Generator().manual_seed(7)).tolist()
    most = max(1, math.ceil(factor * count * 2 / num_experts))
    p_TE = torch.softmax(x_TD @ router.weight.t(), 1).detach()
    value_TK, index_TK = p_TE.topk(2)
    value_TK = value_TK / value_TK.sum(1, keepdim=True)
    taken, expected_TE = [0] * num_experts, torch.zeros(count, num_experts)
    for t in range(count):
        e = int(index_TK[t, 0])
        if taken[e] < most:
            expected_TE[t, e] = value_TK[t, 0]
            taken[e] += 1
    for t in range(count):
        e = int(index_TK[t, 1])
        if taken[e] < most and (not training or 2 * float(value_TK[t, 1]) > chance[t]):
            expected_TE[t, e] = value_TK[t, 1]
            taken[e] += 1
    torch.testing.assert_close(routing.validate().dense().detach(), expected_TE, msg=f"seed {seed}")
    assert routing.load_E.tolist() == taken


def test_needs_two_experts_and_takes_two():
    with pytest.raises(UsageError, match="at least 2"):
        GShard(WIDTH, 1)
    with pytest.raises(UsageError, match="TopK"):
        GShard(WIDTH, 4, top_k=3)
