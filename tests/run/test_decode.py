"""Few tokens: the same values as the reference, for every routing and storage that it says it takes."""

import dataclasses
import sys

import pytest
import torch

from turnout.paths import Bank
from turnout.run import execute, sort
from turnout.run.compiled.experts import few_rows
from turnout.run.decode import decode, decoder, suits_decoding
from turnout.types import Routing


def case(tokens, experts=8, k=2, dtype=torch.float32, bias=False, activation="swiglu", seed=0):
    g = torch.Generator().manual_seed(seed)
    weight_TK, index_TK = torch.rand(tokens, experts, generator=g).topk(k)
    bank = Bank(experts, 24, 20, std=0.3, bias=bias, activation=activation, generator=g)
    if bias:
        bank.up_bias.data.normal_(generator=g)
        bank.down_bias.data.normal_(generator=g)
    x_TD = torch.randn(tokens, 24, generator=g).to(dtype)
    return x_TD, Routing.from_topk(index_TK, weight_TK, num_experts=experts), bank.to(dtype)


@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
def test_equals_reference(tokens, dtype, off):
    for activation, bias in (("swiglu", False), ("gelu", True), ("reglu", True), ("swiglu_oai", True)):
        x_TD, routing, bank = case(tokens, dtype=dtype, bias=bias, activation=activation)
        with torch.no_grad():
            assert suits_decoding(x_TD, routing, bank.weights())
            got = decode(x_TD, routing, bank.weights())
            bank = bank.float()
            expected = execute(x_TD.float(), routing, bank.weights(), backend="reference")
        assert got.dtype == dtype and got.shape == x_TD.shape
        assert float((got.float() - expected).norm() / expected.norm()) < off


@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("stored", ["both", "up", "down", "neither"])
def test_weights_stored_out_in_and_in_out_equal_reference(stored, tokens, dtype, off):
    for activation, bias, experts in (("swiglu", False, 8), ("swiglu_oai", True, 2)):
        x_TD, routing, bank = case(tokens, experts=experts, dtype=dtype, bias=bias, activation=activation)
        with torch.no_grad():
            given = bank.weights()
            rows = {"up_EDH": bank.up_EDH.contiguous(), "down_EFD": bank.down_EFD.contiguous()}
            made = {"up": ["down_EFD"], "down": ["up_EDH"], "both": [], "neither": [*rows]}[stored]
            weights = dataclasses.replace(given, **{name: rows[name] for name in made})
            got = decode(x_TD, routing, weights)
            bank = bank.float()
            expected = execute(x_TD.float(), routing, bank.weights(), backend="reference")
            assert suits_decoding(x_TD, routing, weights) or (stored in ("down", "neither") and experts == 2)
        assert float((got.float() - expected).norm() / expected.norm()) < off


def test_tokens_with_none_one_and_all_experts():
    mask_TE = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    routing = Routing.from_dense(torch.rand(4, 4, generator=torch.Generator().manual_seed(0)), mask_TE=mask_TE)
    x_TD, _, bank = case(4, experts=4)
    with torch.no_grad():
        got = decode(x_TD, routing, bank.weights())
        torch.testing.assert_close(got, execute(x_TD, routing, bank.weights(), backend="reference"))
    assert not got[0].any() and not got[3].any()


def test_sort_takes_it_without_gradients_alone(monkeypatch):
    called = []
    monkeypatch.setattr(sys.modules["turnout.run.sort"], "decoder", lambda *given: called.append(1) or decoder(*given))
    x_TD, routing, bank = case(2)
    sort(x_TD, routing, bank.weights()).sum().backward()
    assert not called and bank.up.grad is not None
    with torch.no_grad():
        sort(x_TD, routing, bank.weights())
    assert called


def test_what_it_leaves_to_products():
    with torch.no_grad():
        x_TD, routing, bank = case(2)
        weights = bank.weights()
        assert suits_decoding(x_TD, routing, weights)
        for more, stored in ((case(65), lambda stack: stack), (case(17), torch.Tensor.contiguous)):
            of = more[2].weights()
            kept = dataclasses.replace(of, up_EDH=stored(of.up_EDH), down_EFD=stored(of.down_EFD))
            assert not suits_decoding(more[0], more[1], kept), "kernels take 64 tokens, sums of rows 16"
        assert not suits_decoding(x_TD.double(), routing, weights)
        many = case(16, experts=2, k=2)
        stored = many[2].weights()
        rows = dataclasses.replace(stored, up_EDH=stored.up_EDH.contiguous(), down_EFD=stored.down_EFD.contiguous())
        assert not suits_decoding(many[0], many[1], rows), "16 rows an expert, read row by row"
        assert suits_decoding(many[0], many[1], stored), "as many, by products"


def test_weights_of_experts_without_tokens_are_not_read():
    x_TD, routing, bank = case(2, experts=16)
    idle_E = routing.load_E == 0
    with torch.no_grad():
        bank.up[idle_E] = torch.nan
        bank.down[idle_E] = torch.nan
        assert idle_E.any() and torch.isfinite(decode(x_TD, routing, bank.weights())).all()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype, off", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_weights_stored_out_in_go_to_the_compiled_kernels(monkeypatch, dtype, off):
    module, called = sys.modules["turnout.run.decode"], []
    monkeypatch.setattr(module, "few_rows", lambda *given: called.append(1) or few_rows(*given))
    for tokens, experts, taken in ((1, 8, True), (33, 16, True), (64, 8, False), (65, 64, False)):
        x_TD, routing, bank = case(tokens, experts=experts, dtype=dtype, bias=True)
        given = bank.weights()
        up_EDH, down_EFD = bank.up.detach().contiguous().mT, bank.down.detach().contiguous().mT
        weights = dataclasses.replace(given, up_EDH=up_EDH, down_EFD=down_EFD)
        called.clear()
        with torch.no_grad():
            got = execute(x_TD, routing, weights)
        assert bool(called) == taken
        expected = execute(x_TD.float(), routing, bank.float().weights(), backend="reference").detach()
        assert float((got.float() - expected).norm() / expected.norm()) < off


@pytest.mark.usefixtures("compiled")
def test_what_torch_traces_or_transforms_never_comes_to_a_kernel(monkeypatch):
    def refuse(*given):
        raise AssertionError("a kernel was called")

    monkeypatch.setattr(sys.modules["turnout.run.decode"], "few_rows", refuse)
    x_TD, routing, bank = case(2)
    up_EDH, down_EFD = bank.up.detach().contiguous().mT, bank.down.detach().contiguous().mT
    weights = dataclasses.replace(bank.weights(), up_EDH=up_EDH, down_EFD=down_EFD)
    with pytest.raises(AssertionError, match="was called"):
        execute(x_TD, routing, weights)
    expected = execute(x_TD, routing, weights, backend="reference")
    slope = torch.func.grad(lambda x: execute(x, routing, weights).sum())(x_TD)
    assert slope.shape == expected.shape and slope.any()
    many = torch.func.vmap(lambda x: execute(x, routing, weights))(x_TD[None].expand(3, -1, -1))
    torch.testing.assert_close(many[1], expected)
    execute(x_TD.clone().requires_grad_(), routing, weights).sum().backward()
    flat = {name: one.to("meta") if isinstance(one, torch.Tensor) else one for name, one in vars(weights).items()}
    on_meta = dataclasses.replace(weights, **{name: flat[name] for name in ("up_EDH", "down_EFD")})
    assert not suits_decoding(x_TD.to("meta"), routing, on_meta)
