import pytest
import torch

from turnout.decide.token import ReMoE
from turnout.errors import UsageError

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def built(**options):
    router = ReMoE(6, 8, **options)
    with torch.no_grad():
        router.weight.normal_(0, 0.7, generator=torch.Generator().manual_seed(1))
    return router


def test_weights_are_the_logits_above_zero():
    router = built()
    logit_TE = X @ router.weight.t()
    torch.testing.assert_close(router(X).dense(), logit_TE.relu())


def test_with_even_shares_the_penalty_is_plain_l1():
    router = built(top_k=2)
    routing = router(X)
    share_E = routing.load_E / (2 * 40)
    want = router.strength * 8 * (share_E * routing.score_TE.mean(0)).sum()
    torch.testing.assert_close(routing.penalty, want)
    with torch.no_grad():
        router.weight[:] = router.weight[0]  # every expert alike: f_e is the same for all
    routing = router(X)
    plain = router.strength * 8 * (routing.load_E[0] / 80) * routing.score_TE.mean(0).sum()
    torch.testing.assert_close(routing.penalty, plain)


def test_lambda_follows_the_sparsity():
    router = built(top_k=2, start=1.0, rate=1.5).train()
    for load, tokens in ((90, 40), (80, 40), (81, 40), (0, 40)):  # over, exactly, over, under two a token
        router.after_step(torch.tensor([load, 0, 0, 0, 0, 0, 0, 0]), num_tokens=tokens)
    assert float(router.strength) == pytest.approx(1.5**2 / 1.5**2)
    with pytest.raises(UsageError, match="evaluation"):
        router.eval().after_step(torch.zeros(8), num_tokens=1)


def test_lambda_keeps_its_digits_in_half_precision():
    router = built(start=1e-8).bfloat16()
    assert router.strength.dtype == torch.float32 and float(router.strength) == pytest.approx(1e-8)


def test_the_output_is_smooth_in_the_input_where_top_k_jumps():
    """fp64, off the kinks: the layer's output by central differences."""
    router = built().double()
    x_TD = X[:5].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: router(x).dense(), x_TD)


@pytest.mark.parametrize("wrong", [{"start": 0.0}, {"rate": 1.0}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match="start and rate"):
        built(**wrong)
