"""The loss without the logits against the loss of the logits: values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from turnout.errors import ShapeError
from turnout.models import LM, LMConfig, head_loss, token_loss


def given(*rows: int, width: int = 6, vocab: int = 11, seed: int = 0, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*rows, width, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g).to(dtype).requires_grad_()
    target = torch.randint(vocab, rows, generator=g)
    target.flatten()[::3] = -100
    return hidden, weight, target


@pytest.mark.parametrize("rows", [(1, 1), (3, 7), (2, 300), (0, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_equals_the_loss_of_the_logits(rows: tuple[int, ...], dtype: torch.dtype, softcap: float | None) -> None:
    hidden, weight, target = given(*rows, dtype=dtype)
    got = head_loss(hidden, weight, target, softcap=softcap)
    wide = torch.promote_types(dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    want = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum", ignore_index=-100)
    off = 1e-5 if dtype != torch.bfloat16 else 2e-2
    torch.testing.assert_close(got, want, rtol=off, atol=off)
    ours, theirs = (torch.autograd.grad(loss / 7, (hidden, weight)) for loss in (got, want))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=10 * off, atol=off)


def test_rows_at_once_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, target = given(5, 9)
    want = head_loss(hidden, weight, target)
    monkeypatch.setattr("turnout.models.head._ROWS", 7)
    torch.testing.assert_close(head_loss(hidden, weight, target), want)


@pytest.mark.parametrize("kept", ["hidden", "weight"])
def test_one_gradient_alone(kept: str) -> None:
    hidden, weight, target = given(4, 5)
    of_hidden, of_weight = torch.autograd.grad(head_loss(hidden, weight, target), (hidden, weight))
    (hidden if kept == "weight" else weight).requires_grad_(False)
    wanted, want = (hidden, of_hidden) if kept == "hidden" else (weight, of_weight)
    torch.testing.assert_close(torch.autograd.grad(head_loss(hidden, weight, target), wanted)[0], want)


def test_without_gradients_none_are_made() -> None:
    hidden, weight, target = given(4, 5)
    with torch.no_grad():
        assert head_loss(hidden, weight, target).requires_grad is False


def test_under_autocast_as_the_loss_of_the_logits() -> None:
    hidden, weight, target = given(4, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, logits = head_loss(hidden, weight, target), F.linear(hidden, weight)
    want = token_loss(logits, target)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True
    ):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 1e-2


def test_extreme_logits_are_finite() -> None:
    hidden = torch.tensor([[1e4, 1.0], [-1e4, 2.0]], requires_grad=True)
    weight, target = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 0])
    loss = head_loss(hidden, weight, target)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(4e4, rel=1e-6) and torch.isfinite(hidden.grad).all()


def test_refuses_targets_of_other_positions() -> None:
    with pytest.raises(ShapeError, match="same shape"):
        head_loss(torch.zeros(2, 3, 5), torch.zeros(7, 5), torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": False}, {"logit_divisor": 3.0}, {"logit_softcap": 0.05}], ids=str
)
def test_loss_of_a_language_model_is_that_of_its_logits(changes: dict) -> None:
    lm = LM(LMConfig(vocab_size=16, width=8, layers=2, heads=2, **({"tie_embeddings": True} | changes)), seed=1)
    g = torch.Generator().manual_seed(2)
    id_BS, target_BS = (torch.randint(16, (3, 9), generator=g) for _ in range(2))
    losses = lm.loss(id_BS, target_BS).nats, token_loss(lm(id_BS).logits_BSV, target_BS)
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss, list(lm.parameters())) for loss in losses]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
