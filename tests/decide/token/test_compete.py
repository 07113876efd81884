import pytest
import torch

from turnout.decide.token import CompeteSMoE
from turnout.errors import UsageError

X = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
SCALE_E = torch.tensor([1.0, 5.0, 2.0, 0.5])


def outputs(x_TD):
    return x_TD[:, None] * SCALE_E[:, None]


def test_the_longest_outputs_win_and_the_router_learns_who():
    router = CompeteSMoE(6, 4, top_k=2, share=1.0, distil=3.0, balance=0.5)
    routing = router(X, experts=outputs)
    assert routing.load_E.tolist() == [0, 30, 30, 0]
    length_TE = outputs(X).norm(dim=2)
    weight_TK = length_TE[:, 1:3].softmax(1)
    torch.testing.assert_close(routing.dense()[:, 1:3], weight_TK)
    target_TE = torch.zeros(30, 4)
    target_TE[:, 1:3] = weight_TK
    apart = (routing.score_TE - target_TE).square().mean()
    even = 4 * (torch.tensor([0, 0.5, 0.5, 0]) * length_TE.softmax(1).mean(0)).sum()
    torch.testing.assert_close(routing.penalty, 3.0 * apart + 0.5 * even)


def test_the_target_has_no_gradient():
    scale_E = SCALE_E.clone().requires_grad_()
    router = CompeteSMoE(6, 4, share=1.0, balance=0.0)
    routing = router(X, experts=lambda x_TD: x_TD[:, None] * scale_E[:, None])
    routing.penalty.backward()
    assert not bool(scale_E.grad.any()) and bool(router.weight.grad.any())


def test_evaluation_and_other_steps_ask_no_expert():
    router = CompeteSMoE(6, 4, share=0.0)
    assert router(X, generator=torch.Generator()).penalty is None
    assert CompeteSMoE(6, 4, share=1.0).eval()(X).num_entries == 60
    with pytest.raises(UsageError, match="experts"):
        CompeteSMoE(6, 4, share=1.0)(X)


def test_competitions_become_rarer():
    router, shares = CompeteSMoE(6, 4), []
    for done in (0, 1_000_000):
        router.done.fill_(done)
        draws = torch.Generator().manual_seed(0)
        asked = [router(X[:1], generator=draws, experts=outputs).penalty is not None for _ in range(300)]
        shares.append(sum(asked) / 300)
    assert shares[0] == pytest.approx(2 / 3, abs=0.1) and shares[1] == pytest.approx(2 / 33.6, abs=0.05)
