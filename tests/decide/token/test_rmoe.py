import torch

from turnout.decide.token import RMoE

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))


def test_the_cell_is_torchs():
    router = RMoE(6, 8, hidden=5, std=0.5)
    with torch.no_grad():
        for parameter in router.cell.parameters():
            parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(2))
    before = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    z = X @ router.projection.t()
    torch.testing.assert_close(router(X, carry_TX=before).carry_TX, router.cell(z, before))
    torch.testing.assert_close(router(X).carry_TX, router.cell(z))  # from zero
    torch.testing.assert_close(router(X).logit_TE, router.cell(z) @ router.gate.t())


def test_a_shared_cell_learns_from_both_layers():
    first, second = RMoE(6, 8, hidden=5, std=0.5), RMoE(6, 8, hidden=5, std=0.5)
    second.share(first.cell)
    assert not any(name.startswith("cell") for name, _ in second.named_parameters())
    second(X, carry_TX=first(X).carry_TX).score_TE[:, 0].sum().backward()
    assert bool(first.projection.grad.any()) and bool(first.cell.weight_ih.grad.any())


def test_permuting_tokens_permutes_everything():
    router, order = RMoE(6, 8, hidden=5, std=0.5), torch.randperm(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(router(X[order]).dense(), router(X).dense()[order])
