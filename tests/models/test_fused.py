"""The hand-written pieces against the obvious ones: values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from turnout.errors import ShapeError
from turnout.models import token_loss
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
    want = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="sum", ignore_index=-100) / 7
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
