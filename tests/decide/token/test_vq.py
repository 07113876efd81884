import torch

from turnout.decide.token import VQ

X = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))


def test_the_nearest_code_and_its_gradient():
    router = VQ(6, 5, std=1.0, generator=torch.Generator().manual_seed(1))
    x_TD = X.clone().requires_grad_()
    routing = router(x_TD)
    nearest_T = torch.cdist(X, router.weight.detach()).argmin(1)
    assert torch.equal(routing.dense().argmax(1), nearest_T) and bool((routing.weight_R == 1).all())
    routing.penalty.backward()
    left_TD = router.weight.detach()[nearest_T] - X
    want_ED = torch.zeros(5, 6).index_add(0, nearest_T, 2 * left_TD / left_TD.numel())
    torch.testing.assert_close(router.weight.grad, 0.08 * want_ED)
    torch.testing.assert_close(x_TD.grad, -0.08 * 0.25 * 2 * left_TD / left_TD.numel())
