"""The hand-written pieces against the obvious ones: values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from turnout.errors import ShapeError, UsageError
from turnout.models import head_loss, token_loss
from turnout.models.fused import by_hand, rms_norm, turn


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 5, 8), (2, 7, 3, 6)])
def test_norm(shape: tuple[int, ...]) -> None:
    x, weight, slope = random(*shape), random(shape[-1], seed=1), random(*shape, seed=2).detach()
    assert by_hand(x, weight)
    got, want = rms_norm(x, weight, 1e-3), weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3))
    assert torch.equal(got, want)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-3), want)
    for ours, theirs in zip(
        torch.autograd.grad(got, (x, weight), slope), torch.autograd.grad(want, (x, weight), slope), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_turn() -> None:
    x, slope = random(2, 5, 3, 8), random(2, 5, 3, 8, seed=1).detach()
    angle = random(5, 4, seed=2).detach()
    got = turn(x[:, :, 1:], angle.cos(), angle.sin())
    a, b = x[:, :, 1:, :4], x[:, :, 1:, 4:]
    pair = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)[:, None]
    want = torch.cat((pair.real, pair.imag), -1)
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(turn(x[:, :, 1:], angle.cos(), angle.sin()), want)
    ours, theirs = (torch.autograd.grad(y, x, slope[:, :, 1:], retain_graph=True)[0] for y in (got, want))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [(1, 1), (3, 7), (2, 300)])
def test_loss(rows: tuple[int, int], dtype: torch.dtype) -> None:
    logits = (random(*rows, 11).detach() * 3).to(dtype).requires_grad_()
    target = torch.randint(11, rows, generator=torch.Generator().manual_seed(3))
    target[0, ::3] = -100
    got = token_loss(logits, target) / 7
    wide = logits.flatten(0, 1).to(torch.promote_types(dtype, torch.float32))
    want = F.cross_entropy(wide, target.flatten(), reduction="sum", ignore_index=-100) / 7
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    ours, theirs = torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0]
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-4 if dtype != torch.bfloat16 else 1e-2, atol=1e-6)


def test_loss_of_extreme_logits_is_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 2.0, 1.0]], requires_grad=True)
    loss = token_loss(logits, torch.tensor([1, 1]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(2e4 + 0.3132617, rel=1e-6) and torch.isfinite(logits.grad).all()


def test_loss_refuses_targets_of_other_positions() -> None:
    with pytest.raises(ShapeError, match="same shape"):
        token_loss(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))


def losses(vocab: int = 5, width: int = 3):
    hidden, weight = torch.randn(4, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    return {
        "token_loss": lambda target: token_loss(hidden @ weight.t(), target),
        "head_loss": lambda target: head_loss(hidden, weight, target),
    }, (hidden, weight)


@pytest.mark.parametrize("name", ["token_loss", "head_loss"])
@pytest.mark.parametrize("wrong", [-1, -99, -101, 5, 1 << 40])
def test_a_target_is_a_token_or_none(name, wrong) -> None:
    with pytest.raises(UsageError, match=f"a target must be from 0 to 4, or -100.*got {wrong}"):
        losses()[0][name](torch.tensor([0, -100, wrong, 4]))


@pytest.mark.parametrize("name", ["token_loss", "head_loss"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool])
def test_targets_of_another_dtype_are_refused(name, dtype) -> None:
    with pytest.raises(UsageError, match=r"torch\.int64"):
        losses()[0][name](torch.zeros(4, dtype=dtype))


@pytest.mark.parametrize("name", ["token_loss", "head_loss"])
def test_no_target_at_all_is_a_sum_of_nothing(name) -> None:
    made, leaves = losses()
    loss = made[name](torch.full((4,), -100))
    want = F.cross_entropy(leaves[0] @ leaves[1].t(), torch.full((4,), -100), reduction="sum")
    assert float(loss.detach()) == float(want.detach()) == 0
    for slope in torch.autograd.grad(loss, leaves):
        assert torch.equal(slope, torch.zeros_like(slope))


def test_what_torch_makes_by_default_changes_nothing() -> None:
    """Some set the default dtype while a model is loaded."""
    x, target, weight = torch.randn(1, 4, 2, 6), torch.tensor([1, 2, -100, 0]), torch.randn(5, 6)
    angle = torch.randn(4, 3)

    def run() -> list[torch.Tensor]:
        leaves = [one.clone().requires_grad_() for one in (x, weight)]
        heads = turn(leaves[0], angle.cos(), angle.sin())
        loss = head_loss(heads[0, :, 0], leaves[1], target) + token_loss(heads[0, :, 1] @ leaves[1].t(), target)
        return [heads, loss, *torch.autograd.grad(loss, leaves)]

    usual = run()
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = run()
    finally:
        torch.set_default_dtype(torch.float32)
    for found, wanted in zip(other, usual, strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def test_angles_that_learn_have_a_gradient() -> None:
    angle = torch.randn(4, 3, requires_grad=True)
    turn(torch.randn(1, 4, 2, 6), angle.cos(), angle.sin()).square().sum().backward()
    turn(torch.randn(1, 4, 2, 6), angle.cos(), angle.sin())[..., :2].sum().backward()
    assert angle.grad is not None and bool((angle.grad != 0).any())
