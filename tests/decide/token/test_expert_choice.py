import math

import pytest
import torch

from turnout.decide.token import ExpertChoice, TopK
from turnout.errors import UsageError

WIDTH = 16


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("count", "num_experts", "factor"), [(64, 8, 2.0), (63, 8, 1.0), (5, 4, 0.5), (7, 7, 7.0)])
def test_equals_a_loop_over_experts(seed, count, num_experts, factor):
    generator = torch.Generator().manual_seed(seed)
    router = ExpertChoice(WIDTH, num_experts, top_k=1, capacity_factor=factor, std=0.5, generator=generator)
    x_TD = torch.randn(count, WIDTH, generator=generator)
    routing = router(x_TD).validate()
    taken = min(count, max(1, math.ceil(factor * count / num_experts)))
    score_TE = torch.softmax(x_TD @ router.weight.t(), 1).detach()
    expected_TE = torch.zeros_like(score_TE)
    for e in range(num_experts):
        order = sorted(range(count), key=lambda t: -float(score_TE[t, e]))[:taken]
        expected_TE[order, e] = score_TE[order, e]
    torch.testing.assert_close(routing.dense().detach(), expected_TE, msg=f"seed {seed}")


@pytest.mark.parametrize("count", [1, 3, 8, 64, 101])
def test_the_load_is_exactly_even(count):
    router = ExpertChoice(WIDTH, 8, capacity_factor=2.0, std=5.0)
    load_E = router(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0))).load_E
    assert load_E.tolist() == [math.ceil(2 * count / 8)] * 8


def test_the_capacity_factor_defaults_to_top_k():
    assert ExpertChoice(WIDTH, 8, top_k=3).capacity_factor == 3.0
    assert ExpertChoice(WIDTH, 8, top_k=3, capacity_factor=1.5).capacity_factor == 1.5
    with pytest.raises(UsageError, match="top_k"):
        ExpertChoice(WIDTH, 8, top_k=9)


def test_an_expert_takes_no_more_tokens_than_there_are():
    routing = ExpertChoice(WIDTH, 2, capacity_factor=100.0)(torch.randn(3, WIDTH)).validate()
    assert routing.load_E.tolist() == [3, 3]


def rerouted_by_the_future(router: torch.nn.Module, seed: int) -> bool:
    """Whether a change of the last token alone changes the experts of an earlier one."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(32, WIDTH, generator=generator)
    later_TD = x_TD.clone()
    later_TD[-1] = 3 * torch.randn(WIDTH, generator=generator)
    return bool(((router(x_TD).dense() != 0) != (router(later_TD).dense() != 0))[:-1].any())


def test_it_leaks_the_future_and_token_choice_does_not():
    """The caveat: whether an earlier token keeps its expert depends on a later one."""
    chance = torch.Generator().manual_seed(0)
    ours, plain = (kind(WIDTH, 4, top_k=2, std=0.5, generator=chance) for kind in (ExpertChoice, TopK))
    seeds = range(20)
    assert any(rerouted_by_the_future(ours, seed) for seed in seeds)
    assert not any(rerouted_by_the_future(plain, seed) for seed in seeds)


def test_a_token_may_get_no_expert():
    router = ExpertChoice(WIDTH, 2, top_k=1)
    router.weight.data.zero_()
    router.weight.data[0, 0], router.weight.data[1, 0] = 1.0, -1.0
    x_TD = torch.zeros(4, WIDTH)
    x_TD[:, 0] = torch.tensor([2.0, 1.0, -1.0, 0.0])
    assert (router(x_TD).dense() != 0).tolist() == [[True, False], [True, False], [False, True], [False, True]]
    x_TD[:, 0] = torch.tensor([2.0, 0.0, 0.0, -2.0])
    router.capacity_factor = 0.5
    assert (router(x_TD).dense() != 0).any(1).tolist() == [True, False, False, True]
