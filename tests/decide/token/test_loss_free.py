import copy

import pytest
import torch

from turnout.decide.token import LossFree
from turnout.decide.token.correction import nudge
from turnout.errors import ShapeError, UsageError

WIDTH = 16


def test_the_bias_moves_towards_an_even_load():
    router = LossFree(WIDTH, 4, top_k=1, rate=0.25)
    router.after_step(torch.tensor([10, 0, 5, 5]))
    assert router.bias_E.tolist() == [-0.25, 0.25, 0.0, 0.0]
    router.after_step(torch.tensor([10.0, 0.0, 5.5, 4.5]))
    assert router.bias_E.tolist() == [-0.5, 0.5, -0.25, 0.25]
    router.after_step(torch.zeros(4, dtype=torch.long))
    assert router.bias_E.tolist() == [-0.5, 0.5, -0.25, 0.25]


def test_the_mean_is_exact():
    """Loads of 2^25 and one more differ from their mean by less than fp32 can tell."""
    assert nudge(torch.zeros(2), torch.tensor([2**25, 2**25 + 1]), 1.0).tolist() == [1.0, -1.0]
    third = torch.tensor([1, 1, 2])  # a mean of 4 / 3
    assert nudge(torch.zeros(3), third, 1.0).tolist() == [1.0, 1.0, -1.0]


def test_the_bias_chooses_and_the_plain_scores_weigh():
    router = LossFree(WIDTH, 4, top_k=2, std=0.5)
    x_TD = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0))
    before = router(x_TD)
    router.bias_E.copy_(torch.tensor([-9.0, 9.0, 0.0, -9.0]))
    after = router(x_TD)
    assert torch.equal(before.score_TE, after.score_TE)
    assert after.load_E.tolist() == [0, 50, 50, 0]
    assert torch.equal(after.weight_R, after.score_TE[after.token_R, after.expert_R])


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_equals_the_formula(scores, renormalize):
    router = LossFree(WIDTH, 6, top_k=3, scores=scores, renormalize=renormalize, std=0.5)
    router.bias_E.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    x_TD = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(2))
    logit_TE = (x_TD @ router.weight.t()).detach()
    s_TE = torch.sigmoid(logit_TE) if scores == "sigmoid" else torch.softmax(logit_TE, 1)
    _, index_TK = (s_TE + router.bias_E).topk(3)
    expected_TE = torch.zeros(40, 6).scatter(1, index_TK, s_TE.gather(1, index_TK))
    if renormalize:
        expected_TE = expected_TE / expected_TE.sum(1, keepdim=True)
    torch.testing.assert_close(router(x_TD).dense().detach(), expected_TE)


def test_forward_never_moves_the_bias():
    router = LossFree(WIDTH, 4)
    x_TD = torch.randn(64, WIDTH)
    for training in (True, False):
        router.train(training)(x_TD).weight_R.sum().backward()
        assert router.bias_E.tolist() == [0.0] * 4
    assert not router.bias_E.requires_grad


def test_evaluation_refuses_to_balance():
    router = LossFree(WIDTH, 4).eval()
    with pytest.raises(UsageError, match="training mode"):
        router.after_step(torch.tensor([4, 0, 0, 0]))
    assert router.bias_E.tolist() == [0.0] * 4


def test_a_load_of_another_size_is_refused():
    with pytest.raises(ShapeError, match="load_E"):
        LossFree(WIDTH, 4).after_step(torch.tensor([4, 0, 0]))


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="sigmoid"):
        LossFree(WIDTH, 4, scores="tanh")
    for rate in (-0.1, float("nan")):
        with pytest.raises(UsageError, match="rate"):
            LossFree(WIDTH, 4, rate=rate)


def max_vio(load_E: torch.Tensor) -> float:
    return float(load_E.max() / load_E.double().mean() - 1)


@pytest.mark.parametrize("seed", range(3))
def test_balancing_evens_out_a_skewed_router(seed):
    """A fixed, skewed gate on fresh tokens: the bias alone brings MaxVio from above 1 to below 0.2."""
    generator = torch.Generator().manual_seed(seed)
    router = LossFree(WIDTH, 8, top_k=2, rate=0.004, std=0.1, generator=generator)
    skew_D = torch.randn(WIDTH, generator=generator) * 3
    first = max_vio(router(torch.randn(4096, WIDTH, generator=generator) + skew_D).load_E)
    for _ in range(400):
        router.after_step(router(torch.randn(512, WIDTH, generator=generator) + skew_D).load_E)
    last = max_vio(router(torch.randn(4096, WIDTH, generator=generator) + skew_D).load_E)
    assert first > 1 and last < 0.2, f"seed {seed}: {first:.2f} -> {last:.2f}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_bias_keeps_its_digits_when_the_module_is_cast(dtype):
    router = LossFree(WIDTH, 4, rate=0.001)
    for _ in range(3):
        router.after_step(torch.tensor([3, 1, 1, 1]))
    bias_E = router.bias_E.clone()
    router.to(dtype)
    assert router.weight.dtype == dtype and router.bias_E.dtype == torch.float32
    assert torch.equal(router.bias_E, bias_E)
    router.after_step(torch.tensor([3, 1, 1, 1]))
    assert not torch.equal(router.bias_E, bias_E)
    assert torch.equal(copy.deepcopy(router).bias_E, router.bias_E)
    assert set(router.state_dict()) == {"weight", "bias_E"}


def test_it_can_be_made_on_the_meta_device():
    with torch.device("meta"):
        router = LossFree(WIDTH, 4)
    router.to(torch.bfloat16).to_empty(device="cpu")
    assert router.bias_E.dtype == torch.float32 and router.bias_E.device.type == "cpu"
