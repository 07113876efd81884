import pytest
import torch
from torch.nn import functional as F

from turnout.decide.token import NoisyTopK

WIDTH = 16


def test_follows_the_papers_equations():
    router = NoisyTopK(WIDTH, 6, top_k=3, std=0.5).train()
    with torch.no_grad():
        router.noise_weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    x_TD = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(2))
    routing = router(x_TD, generator=torch.Generator().manual_seed(3))
    normal_TE = torch.randn(20, 6, generator=torch.Generator().manual_seed(3))
    clean_TE = x_TD @ router.weight.t()
    h_TE = clean_TE + normal_TE * F.softplus(x_TD @ router.noise_weight.t())
    least_T1 = h_TE.topk(3)[0][:, -1:]
    expected_TE = h_TE.masked_fill(h_TE < least_T1, float("-inf")).softmax(1)
    torch.testing.assert_close(routing.dense(), expected_TE)
    torch.testing.assert_close(routing.score_TE, h_TE.softmax(1))
    torch.testing.assert_close(routing.logit_TE, clean_TE)


def test_evaluation_uses_the_clean_logits():
    router = NoisyTopK(WIDTH, 6, top_k=2).eval()
    x_TD = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(2))
    value_TK, index_TK = (x_TD @ router.weight.t()).topk(2)
    expected_TE = torch.zeros(20, 6).scatter(1, index_TK, value_TK.softmax(1))
    torch.testing.assert_close(router(x_TD).dense().detach(), expected_TE.detach())


def test_noise_starts_at_the_spread_of_softplus_of_zero():
    router = NoisyTopK(WIDTH, 50, top_k=2).train()
    router.weight.data.zero_()
    routing = router(torch.randn(4000, WIDTH), generator=torch.Generator().manual_seed(0))
    # score_TE is a softmax of the noise: its logarithm is the noise up to a constant per row.
    assert float(routing.score_TE.detach().log().std(dim=1).mean()) == pytest.approx(0.6931, rel=0.01)
