import torch

from turnout.decide.token import SparseTransport
from turnout.decide.token.sparse_transport import _projected
from turnout.solve.transport_sparse import sparse_projection

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def built(**options):
    router = SparseTransport(6, 8, **options)
    with torch.no_grad():
        router.weight.normal_(0, 0.7, generator=torch.Generator().manual_seed(1))
    return router


def test_the_projection_is_the_solvers():
    x_TE = torch.randn(20, 8, generator=torch.Generator().manual_seed(2)).double()
    for k in (1, 3, 8):
        want = torch.from_numpy(sparse_projection(x_TE.t().numpy(), k)).t()
        torch.testing.assert_close(_projected(x_TE, k), want)


def test_at_most_k_and_even_when_it_is_solved():
    assert int((built(top_k=3)(X).dense() > 0).sum(1).max()) <= 3
    load_E = built(top_k=1, iterations=2000, rate=0.01)(X).load_E
    assert int(load_E.max()) <= 10 and int(built(top_k=1, iterations=0)(X).load_E.max()) >= 12


def test_weights_are_the_scores_or_the_plan():
    router = built(top_k=3)
    routing = router(X)
    chosen_TE = routing.dense() > 0
    torch.testing.assert_close(routing.dense(), routing.score_TE * chosen_TE)
    torch.testing.assert_close(built(top_k=3, plan_weights=True)(X).dense().sum(1), torch.ones(64))
