import torch

from turnout.decide.token import XMoE

X = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))


def test_lengths_do_not_count():
    router = XMoE(6, 8)
    want = router(X)
    torch.testing.assert_close(router(7 * X).dense(), want.dense())
    with torch.no_grad():
        router.expert[3] *= 5
    torch.testing.assert_close(router(X).dense(), want.dense())


def test_logits_are_bounded_by_the_scale_which_has_a_limit():
    router = XMoE(6, 8, temperature=0.5)
    assert float(router(X).logit_TE.detach().abs().max()) <= 2 + 1e-5
    with torch.no_grad():
        router.log_scale.fill_(50.0)
    assert float(router(X).logit_TE.detach().abs().max()) <= 100 + 1e-3


def test_the_gradient_is_across_the_projected_token():
    router = XMoE(6, 8).double()
    z_TD = torch.eye(4, dtype=torch.float64).requires_grad_()
    unit = torch.nn.functional.normalize(router.expert.double(), dim=1)
    with torch.no_grad():
        router.projection.copy_(torch.eye(4, 6))
    x_TD = torch.cat([z_TD, torch.zeros(4, 2, dtype=torch.float64)], 1)
    router(x_TD).logit_TE[:, 0].sum().backward()
    assert unit.shape == (8, 4)
    torch.testing.assert_close((z_TD.grad * z_TD).sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
