import pytest
import torch

from turnout.decide.token import HyperRouter
from turnout.errors import UsageError

X = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))


def test_one_step_moves_the_embedding_and_nothing_else():
    router = HyperRouter(6, 8)
    before = {name: tensor.clone() for name, tensor in router.state_dict().items()}
    adam = torch.optim.AdamW(router.parameters(), lr=0.1)
    router(X).weight_R.square().sum().backward()
    adam.step()
    moved = [name for name, tensor in router.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved == ["embedding"]


def test_it_is_the_linear_router_that_is_made():
    router = HyperRouter(6, 8)
    weight_ED, bias_E = router.made()
    logit_TE = X @ weight_ED.t() + bias_E
    top = logit_TE.topk(2, dim=1)
    want_TE = torch.zeros(30, 8).scatter(1, top.indices, top.values.softmax(1))
    torch.testing.assert_close(router(X).dense(), want_TE)


def test_k_grows_and_is_kept():
    router, seen = HyperRouter(6, 8, top_k=2, end_k=6, steps=4), []
    for _ in range(6):
        seen.append(router.k_now)
        router.after_step(torch.zeros(8))
    assert seen == [2, 3, 4, 5, 6, 6]
    again = HyperRouter(6, 8, top_k=2, end_k=6, steps=4)
    again.load_state_dict(router.state_dict())
    assert again.k_now == 6
    with pytest.raises(UsageError, match="end_k"):
        HyperRouter(6, 8, end_k=1)
