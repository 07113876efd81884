import pytest
import torch

from turnout.decide.token import SAM, Switch, TopK
from turnout.errors import ShapeError, UsageError

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))


def built(kind, count=8, **options):
    router = kind(6, count, **options)
    with torch.no_grad():
        router.weight.normal_(0, 0.7, generator=torch.Generator().manual_seed(1))
    return router


def test_all_of_a_token_lie_in_the_group_of_the_largest_sum():
    router = built(SAM, top_k=2, num_groups=2)
    routing = router(X)
    sum_TG = routing.score_TE.view(50, 2, 4).sum(2)
    group_TK = routing.expert_R[routing.by_token[0]].view(50, 2) // 4
    assert torch.equal(group_TK[:, 0], sum_TG.argmax(1)) and torch.equal(group_TK[:, 0], group_TK[:, 1])


def test_one_group_is_top_k_and_groups_of_one_are_switch():
    assert torch.equal(built(SAM, num_groups=1)(X).dense(), built(TopK, renormalize=False)(X).dense())
    single = built(SAM, top_k=1, num_groups=8)
    assert torch.equal(single(X).dense(), built(Switch, jitter=0.0, capacity_factor=None).eval()(X).dense())


def test_alignment_is_nothing_exactly_where_the_chosen_are_the_largest_of_all():
    assert float(built(SAM, num_groups=1)(X).penalty.detach()) == 0
    router = built(SAM, num_groups=2)
    routing = router(X)
    p_TE, chosen_TE = routing.score_TE, routing.dense() > 0
    least_T1 = p_TE.masked_fill(~chosen_TE, 2).amin(1, keepdim=True)
    group_E = torch.arange(8) // 4
    outside_TE = group_E != (chosen_TE.long().argmax(1, keepdim=True) // 4)
    want = ((p_TE - least_T1).relu() * outside_TE).sum(1).mean()
    torch.testing.assert_close(routing.penalty, want)
    assert float(want.detach()) > 0 and built(SAM, num_groups=2, alignment=0.0)(X).penalty is None


@pytest.mark.parametrize("wrong", [{"num_groups": 3}, {"num_groups": 8}, {"num_groups": 0}])
def test_groups_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ShapeError, match="num_groups"):
        SAM(6, 8, top_k=2, **wrong)
    with pytest.raises(UsageError, match="alignment"):
        SAM(6, 8, alignment=-1.0)
