"""A layer's passes in one call each equal the reference in values and gradients, and sort's pieces to the bit."""

import dataclasses
import importlib

import pytest
import torch

from turnout.run import sort
from turnout.run.compiled import passes
from turnout.run.compiled.dots import able
from turnout.run.reference import reference
from turnout.run.tuned import as_tuned, tuning
from turnout.types import ExpertWeights, Routing

NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
T, D, E, K, F = 90, 64, 7, 2, 96


@pytest.fixture(autouse=True)
def owned(compiled, monkeypatch):
    """Products are turnout's own, and groups so small that there are several."""
    monkeypatch.setattr("turnout.run.plan._SMALL", 3000)
    if not able(torch.float32) or not able(torch.bfloat16):
        pytest.skip("this processor lacks the vectors")
    with as_tuned(dataclasses.replace(tuning(), tiled_rows=64, tiled_rows_short=64, compiled_rows=0, decode_tokens=0)):
        yield


def case(dtype, kind="swiglu", interleaved=False, seed=1, E=E, T=T):
    g = torch.Generator().manual_seed(seed)
    score_TE = torch.rand(T, E, generator=g)
    score_TE[:, min(2, E - 1)] = 0 if E > K else 1  # an expert without entries
    weight_TK, index_TK = score_TE.topk(K)
    wide = 2 * F if kind != "silu" else F
    tensors = [torch.randn(size, generator=g) for size in ((T, D), (E, wide, D), (E, D, F), (T, D))]
    x, up, down, grad = (one.to(dtype) / 4 for one in tensors)
    leaves = [one.detach().clone().requires_grad_() for one in (x, weight_TK, up, down)]

    def run(executor, double=False):
        given = [one.detach().double().requires_grad_() if double else one for one in leaves]
        for one in given:
            one.grad = None
        weights = ExpertWeights(given[2].transpose(1, 2), given[3].transpose(1, 2), None, None, kind,
                                interleaved=interleaved)  # fmt: skip
        y = executor(given[0], Routing.from_topk(index_TK, given[1], num_experts=E), weights)
        if y.requires_grad:
            y.backward(grad.to(y.dtype))
        return [y.detach(), *(one.grad for one in given)]

    return run, leaves


@pytest.fixture
def calls(monkeypatch):
    """How often a pass was one call."""
    made = []
    for name in ("_forward", "_backward"):
        inner = getattr(passes, name)
        monkeypatch.setattr(passes, name, lambda *given, inner=inner, name=name: made.append(name) or inner(*given))
    return made


@pytest.mark.parametrize(("kind", "interleaved"), [("swiglu", False), ("swiglu_oai", True), ("silu", False)])
@pytest.mark.parametrize("dtype", NEAR)
def test_values_and_gradients(dtype, kind, interleaved, calls):
    run, _ = case(dtype, kind, interleaved)
    found = run(sort)
    assert calls == ["_forward", "_backward"]
    for one, wanted in zip(found, run(reference, double=True), strict=True):
        assert one is not None and float((one.double() - wanted).norm() / wanted.norm()) < NEAR[dtype]
    assert not found[3][2].any() and not found[4][2].any()  # the expert that nobody takes


def test_the_same_bits_as_piece_by_piece_without_gradients_and_by_any_group(monkeypatch, calls):
    run, leaves = case(torch.float32)
    found = run(sort)
    monkeypatch.setattr("turnout.run.plan._SMALL", 1 << 20)
    assert all(map(torch.equal, found, run(sort)))
    for leaf in leaves:
        leaf.requires_grad_(False)
    assert torch.equal(run(sort)[0], found[0])
    assert calls == ["_forward", "_backward"] * 2 + ["_forward"]
    for leaf in leaves:
        leaf.requires_grad_(True)
    monkeypatch.setattr(importlib.import_module("turnout.run.sort"), "suits_passes", lambda *given: False)
    assert all(map(torch.equal, found, run(sort))) and len(calls) == 5


@pytest.mark.parametrize("dtype", NEAR)
def test_only_what_is_asked_for(dtype, calls):
    run, leaves = case(dtype)
    whole = run(sort)
    for place in range(4):
        for other, leaf in enumerate(leaves):
            leaf.requires_grad_(other == place)
        found = run(sort)
        assert torch.equal(found[0], whole[0]) and torch.equal(found[1 + place], whole[1 + place])
        assert [one is None for one in found[1:]] == [other != place for other in range(4)]
    assert len(calls) == 10


def test_what_does_not_suit_goes_piece_by_piece(calls):
    run, _ = case(torch.float32)
    with as_tuned(dataclasses.replace(tuning(), tiled_rows=8, tiled_rows_short=8)):
        run(sort)
    run, _ = case(torch.float32, "geglu")  # its error function is no sigmoid
    run(sort)
    assert not calls
    run, _ = case(torch.bfloat16, T=1, E=2)
    run(sort)
    assert calls


def test_rows_that_lie_otherwise(calls):
    run, leaves = case(torch.float32)
    wanted = run(sort)
    leaves[0] = torch.cat([leaves[0].detach()] * 2, 1)[:, :D].requires_grad_()
    assert not leaves[0].is_contiguous()
    assert all(map(torch.equal, wanted, run(sort))) and len(calls) == 4


@pytest.mark.slow
def test_the_same_bits_on_two_threads():
    run, _ = case(torch.float32)
    found, before = run(sort), torch.get_num_threads()
    with as_tuned(tuning()):
        torch.set_num_threads(2)
        try:
            assert all(map(torch.equal, found, run(sort)))
        finally:
            torch.set_num_threads(before)
