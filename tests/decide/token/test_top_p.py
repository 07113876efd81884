import pytest
import torch

from turnout.decide.token import TopP
from turnout.errors import UsageError

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))


def built(**options):
    router = TopP(6, 8, **options)
    with torch.no_grad():
        router.weight.normal_(0, 0.7, generator=torch.Generator().manual_seed(1))
    return router


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_what_is_taken_is_more_than_p_and_without_the_last_it_is_not(threshold):
    routing = built(threshold=threshold)(X)
    dense_TE = routing.dense()
    least_T = dense_TE.masked_fill(dense_TE == 0, 2).amin(1)
    assert bool((dense_TE.sum(1) > threshold).all())
    assert bool((dense_TE.sum(1) - least_T <= threshold + 1e-6).all())
    assert bool((dense_TE.amax(1) == routing.score_TE.amax(1)).all())


def test_the_ends_are_top_1_and_all():
    assert built(threshold=0.0)(X).load_E.sum() == 50 and built(threshold=1.0)(X).load_E.sum() == 400


def test_the_penalty_is_the_entropy():
    routing = built(entropy=0.5)(X)
    p_TE = routing.score_TE
    torch.testing.assert_close(routing.penalty, -0.5 * (p_TE * p_TE.log()).sum(1).mean())
    assert built(entropy=0.0)(X).penalty is None


def test_p_moves_to_the_budget():
    router = built(top_k=2, threshold=0.5, rate=0.1).train()
    router.after_step(torch.full((8,), 10), num_tokens=20)  # four a token
    assert float(router.threshold_now) == pytest.approx(0.4)
    router.after_step(torch.full((8,), 5), num_tokens=20)  # two
    router.after_step(torch.full((8,), 1), num_tokens=20)
    assert float(router.threshold_now) == pytest.approx(0.5)
    with pytest.raises(UsageError, match="threshold"):
        built(threshold=1.5)
