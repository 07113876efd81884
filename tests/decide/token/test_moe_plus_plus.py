import pytest
import torch

from turnout.decide.token import MoEPlusPlus
from turnout.errors import UsageError
from turnout.layers import MoE

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def built(**options):
    router = MoEPlusPlus(6, 8, **({"free": 4, "zero": 1} | options))
    with torch.no_grad():
        router.weight.normal_(0, 0.7, generator=torch.Generator().manual_seed(1))
    return router


@pytest.mark.parametrize("weights", ["masked", "sum", "raw"])
def test_weights_are_as_they_are_called(weights):
    routing = built(weights=weights)(X)
    top = routing.score_TE.topk(2, dim=1)
    value_TK = top.values
    if weights == "masked":
        value_TK = value_TK * (top.indices != 7)
    if weights != "raw":
        value_TK = value_TK / value_TK.sum(1, keepdim=True)
    torch.testing.assert_close(routing.dense(), torch.zeros(40, 8).scatter(1, top.indices, value_TK))


def test_the_logits_before_are_added_and_handed_on():
    router, before = built(), torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    routing = router(X, carry_TX=before)
    torch.testing.assert_close(routing.logit_TE, X @ router.weight.t() + before @ router.residual.t())
    assert torch.equal(routing.carry_TX, routing.logit_TE)
    plain = built(residual=False)
    assert plain.residual is None and torch.equal(plain(X, carry_TX=before).logit_TE, plain(X).logit_TE)


def test_the_penalty_weighs_those_that_compute_nothing_by_tau():
    routing = built(tau=0.25, balance=0.5)(X)
    eta_E = torch.tensor([1.0] * 4 + [0.25] * 4)
    want = 0.5 * (eta_E * routing.load_E / 40 * routing.score_TE.mean(0)).sum()
    torch.testing.assert_close(routing.penalty, want)


def test_the_layer_is_its_formulas_in_a_loop():
    """fp64: ordinary experts, constants a1 x + a2 v, a copy, and zero; values and gradients."""
    generator = torch.Generator().manual_seed(3)
    free = {"constant": 2, "copy": 1, "zero": 1}
    layer = MoE(6, 5, 4, router=built(), zero_computation=free, std=0.5, generator=generator).double()
    x_TD = X.double().requires_grad_()
    y_TD, routing = (out := layer(x_TD)).output, out.routing
    first, rest = layer.bank.banks
    want_TD = torch.zeros_like(x_TD)
    for expert in range(8):
        weight_T1 = routing.dense()[:, expert : expert + 1].double()
        if expert < 4:
            gate, value = (x_TD @ first.up_EDH[expert]).chunk(2, 1)
            made = (torch.nn.functional.silu(gate) * value) @ first.down_EFD[expert]
        elif expert < 6:
            mix = (x_TD @ rest.mix_N2D[expert - 4].t()).softmax(1)
            made = mix[:, :1] * x_TD + mix[:, 1:] * rest.value_ND[expert - 4]
        else:
            made = x_TD if expert == 6 else 0 * x_TD
        want_TD = want_TD + weight_T1 * made
    torch.testing.assert_close(y_TD, want_TD, rtol=1e-6, atol=1e-8)
    got, want = (
        torch.autograd.grad(z.square().sum(), [x_TD, *layer.bank.parameters()], retain_graph=True)
        for z in (y_TD, want_TD)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_numbers_out_of_range_are_refused():
    for wrong in ({"zero": 5}, {"free": 8}, {"tau": 0.0}, {"weights": "other"}):
        with pytest.raises(UsageError):
            built(**wrong)
