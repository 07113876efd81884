import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from turnout.decide.token import BASE
from turnout.decide.token.balanced import even_assignment


@pytest.mark.parametrize(("tokens", "experts"), [(12, 3), (16, 4), (13, 4), (3, 5), (1, 2), (30, 7)])
@pytest.mark.parametrize("seed", range(3))
def test_loads_are_even_and_the_sum_is_the_best(tokens, experts, seed):
    """Against scipy over every choice of who gets one more."""
    score_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)).double()
    chosen_T = even_assignment(score_TE)
    each, more = divmod(tokens, experts)
    load_E = torch.bincount(chosen_T, minlength=experts)
    assert sorted(load_E.tolist()) == [each] * (experts - more) + [each + 1] * more
    got = float(score_TE.gather(1, chosen_T[:, None]).sum())
    places = np.repeat(score_TE.numpy(), each + 1, 1)
    low = -1e6 * np.ones((experts * (each + 1) - tokens, experts * (each + 1)))
    low[:, each :: each + 1] = 0  # only the last place of an expert may be left
    row, column = linear_sum_assignment(np.concatenate([places, low]), maximize=True)
    assert got == pytest.approx(np.concatenate([places, low])[row, column].sum(), abs=1e-9)


def test_a_constant_for_each_expert_changes_nothing_in_training_alone():
    router = BASE(5, 4)
    x_TD = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    score_TE = x_TD @ router.weight.t()
    moved = score_TE + torch.tensor([3.0, 0.0, -1.0, 0.5])
    assert torch.equal(even_assignment(score_TE), even_assignment(moved))
    assert not torch.equal(score_TE.argmax(1), moved.argmax(1))


def test_evaluation_is_the_best_expert_and_the_weight_its_sigmoid():
    router = BASE(5, 4).eval()
    x_TD = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    score_TE = x_TD @ router.weight.t()
    torch.testing.assert_close(router(x_TD).dense().amax(1), score_TE.amax(1).sigmoid())
    assert torch.equal(router(x_TD).dense().argmax(1), score_TE.argmax(1))


def test_centroids_start_orthogonal():
    weight_ED = BASE(16, 4, std=0.1).weight.detach().double()
    gram_EE = weight_ED @ weight_ED.t()
    torch.testing.assert_close(gram_EE, torch.eye(4).double() * gram_EE[0, 0], atol=1e-6, rtol=0)
