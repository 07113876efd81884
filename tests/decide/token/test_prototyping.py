import torch

from turnout.decide.token import Prototyping, TopK
from turnout.train.balance import load_balance_loss

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))


def built(count=8, **options):
    router = Prototyping(6, count, **options)
    with torch.no_grad():
        router.weight.normal_(0, 0.7, generator=torch.Generator().manual_seed(1))
    return router


def test_one_expert_of_every_prototype_by_its_own_softmax():
    router = built(top_k=2)
    dense_TE = router(X).dense()
    for first in (0, 4):
        part_TE, logit_TE = dense_TE[:, first : first + 4], X @ router.weight[first : first + 4].t()
        assert bool(((part_TE > 0).sum(1) == 1).all())
        torch.testing.assert_close(part_TE.amax(1), logit_TE.softmax(1).amax(1))


def test_one_prototype_is_top_1():
    other = TopK(6, 8, top_k=1)
    router = built(top_k=1)
    other.load_state_dict(router.state_dict())
    assert torch.equal(router(X).dense(), other(X).dense())


def test_the_balance_loss_is_the_mean_over_prototypes():
    routing = built(top_k=2)(X)
    want = 0.0
    for first in (0, 4):
        share_E = (routing.dense()[:, first : first + 4] > 0).float().mean(0)
        want += 4 * (share_E * routing.score_TE[:, first : first + 4].mean(0)).sum() / 2
    torch.testing.assert_close(load_balance_loss(routing), want)


def test_experts_that_do_not_come_out_even():
    routing = built(count=7, top_k=3)(X)  # 3, 2 and 2
    assert torch.equal(routing.load_E.split([3, 2, 2])[0].sum(), torch.tensor(60))
    assert [int(part.sum()) for part in routing.load_E.split([3, 2, 2])] == [60, 60, 60]
