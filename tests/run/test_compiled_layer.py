"""The compiled pieces of the layer equal torch's operations in every dtype, activation and layout, and sum in order."""

import importlib

import pytest
import torch

from turnout.run import activate
from turnout.run.compiled.gates import activated, activation_slopes, suits_gates
from turnout.run.compiled.sums import add_rows, suits_sums
from turnout.types.weights import GATED

pytestmark = pytest.mark.usefixtures("compiled")
KINDS = ["swiglu", "geglu_tanh", "reglu", "swiglu_oai", "silu", "gelu_tanh", "relu"]
NEAR = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def wide_case(kind, dtype, interleaved, N=19, F=37):
    g = torch.Generator().manual_seed(len(kind))
    hidden = (torch.randn(N, 2 * F if kind in GATED else F, generator=g) * 5).to(dtype)
    grad, weight = torch.randn(N, F, generator=g).to(dtype), torch.rand(N, generator=g).to(dtype)
    exact = [one.double().requires_grad_() for one in (hidden, weight)]
    out = activate(exact[0], kind, interleaved=interleaved)
    (exact[1][:, None] * out * grad.double()).sum().backward()
    return hidden, grad, weight, out.detach(), exact[0].grad, exact[1].grad


def near(found, wanted, dtype):
    assert float((found.double() - wanted).norm() / wanted.norm()) < NEAR[dtype]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_slopes(kind, dtype, interleaved):
    hidden, grad, weight, out, of_hidden, of_weight = wide_case(kind, dtype, interleaved)
    assert suits_gates(kind, hidden, grad)
    made = torch.full_like(grad, torch.nan)
    activated(hidden, kind, made, interleaved=interleaved)
    near(made, out, dtype)
    slopes, of = torch.full_like(hidden, torch.nan), torch.full((hidden.shape[0],), torch.nan)
    activation_slopes(kind, hidden, grad, weight, made.fill_(torch.nan), slopes, of, interleaved=interleaved)
    near(made, weight.double()[:, None] * out, dtype)
    near(slopes, of_hidden, dtype)
    near(of, of_weight, torch.float32)


def test_far_values_and_what_is_no_number():
    x = torch.tensor([[-200.0, -88.0, 0.0, 88.0, 200.0, torch.inf, torch.nan]])
    out = torch.empty_like(x)
    activated(x, "silu", out)
    torch.testing.assert_close(out[:, :6], torch.nn.functional.silu(x)[:, :6], rtol=1e-6, atol=1e-30)
    assert out[0, 6].isnan()
    for kind in ("relu", "gelu_tanh"):
        activated(x, kind, out)
        assert out[0, 6].isnan() and out[0, 5] == torch.inf and abs(out[0, 0]) < 1e-30
    short = torch.empty(1, 7, dtype=torch.bfloat16)
    activated(x.bfloat16(), "silu", short)
    assert short[0, 6].isnan() and short[0, 4] == 200


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_of_rows(dtype, placed, weighted):
    g = torch.Generator().manual_seed(3)
    rows, token = torch.randn(60, 70, generator=g).to(dtype), torch.randint(9, (40,), generator=g)
    place = torch.randperm(60, generator=g)[:40] if placed else None
    weight = torch.rand(40, generator=g) if weighted else None
    assert suits_sums(rows)
    found = torch.zeros(11, 70)
    add_rows(rows, token, found, place_M=None if place is None else place + 5, first=5, weight_M=weight)
    taken = (rows[:40] if place is None else rows[place]).double()
    wanted = torch.zeros(11, 70).double().index_add(0, token, taken if weight is None else taken * weight[:, None])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert not found[9:].any()


def test_sums_are_the_same_by_any_number_of_threads(monkeypatch):
    g = torch.Generator().manual_seed(4)
    rows, token = torch.randn(50, 300, generator=g), torch.randint(3, (50,), generator=g)
    found = []
    for count in (1, 2, 5):
        monkeypatch.setattr(importlib.import_module("turnout.run.compiled.sums"), "threads", lambda count=count: count)
        found.append(torch.zeros(3, 300))
        add_rows(rows, token, found[-1])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
