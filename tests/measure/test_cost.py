"""Counted costs against costs worked out by hand."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from turnout.errors import UsageError
from turnout.measure import cost, count_flops, count_params


def test_products_count_two_a_multiply_add_forward_and_backward() -> None:
    layer, x = nn.Linear(8, 4), torch.ones(3, 8, requires_grad=True)
    assert count_flops(lambda: layer(x)).flops == 2 * 3 * 8 * 4
    assert count_flops(lambda: layer(x).sum().backward()).flops == 3 * 2 * 3 * 8 * 4
    assert count_flops(lambda: x + 1).flops == 0


def test_attention_with_fewer_key_heads_counts_all_pairs() -> None:
    q, kv = torch.randn(1, 4, 16, 8, requires_grad=True), torch.randn(1, 2, 16, 8, requires_grad=True)

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, kv, kv, is_causal=True, enable_gqa=True)

    pair = 2 * 4 * 16 * 16 * 8
    assert count_flops(attend).flops == 2 * pair
    assert count_flops(lambda: attend().sum().backward()).flops == (2 + 5) * pair


def test_grouped_products_count_every_row_once() -> None:
    rows, stack = torch.randn(8, 16, requires_grad=True), torch.randn(3, 16, 24, requires_grad=True)
    ends = torch.tensor([3, 3, 8], dtype=torch.int32)
    once = 2 * 8 * 16 * 24
    assert count_flops(lambda: F.grouped_mm(rows, stack, offs=ends)).flops == once
    assert count_flops(lambda: F.grouped_mm(rows, stack, offs=ends).square().sum().backward()).flops == 3 * once


def test_a_product_that_the_counter_does_not_know_warns(monkeypatch) -> None:
    monkeypatch.setattr(cost, "_EXTRA", {})
    rows, stack = torch.randn(8, 16), torch.randn(2, 16, 24)
    with pytest.warns(UserWarning, match="_grouped_mm"):
        count_flops(lambda: F.grouped_mm(rows, stack, offs=torch.tensor([3, 8], dtype=torch.int32)))


def test_ordinary_work_does_not_warn() -> None:
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.Softmax(-1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count_flops(lambda: model(torch.arange(5)).sum().backward())
        count_flops(lambda: torch.einsum("ij,kj->ik", torch.ones(2, 3), torch.ones(4, 3)))
        count_flops(lambda: torch.ones(5) @ torch.ones(5))


def test_shared_parameters_count_once() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embedding"].weight
    assert count_params(model).params == 40


def test_active_parameters_follow_the_patterns() -> None:
    model = nn.ModuleDict({"bank": nn.Linear(8, 6), "head": nn.Linear(2, 2, bias=False)})
    counted = count_params(model, active={"bank.weight": 0.5})
    assert (counted.params, counted.params_active) == (48 + 6 + 4, 24 + 6 + 4)
    assert count_params(model).params_active == 58


@pytest.mark.parametrize("active", [{"blank.*": 0.5}, {"bank.*": 1.5}])
def test_patterns_that_cannot_be_meant_are_refused(active: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"bank\.weight"):
        count_params(nn.ModuleDict({"bank": nn.Linear(2, 2)}), active=active)
