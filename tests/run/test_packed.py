"""Maps and experts in few bits compute what their weights written out do."""

import pytest
import torch

from turnout.errors import ShapeError
from turnout.run import packed, packed_experts, packed_linear, packed_reference
from turnout.types import Packed, PackedWeights, Routing

E, D, F = 5, 16, 8


def some(*shape: int, bits: int, group: int, levels: bool = False, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    low, high = (0, 16) if levels else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    value = torch.randint(low, high, shape, generator=generator)
    scale = (torch.rand(*shape[:-1], shape[-1] // group, generator=generator) + 0.5) / high
    return Packed.of(value, scale, group=group, bits=bits, levels=torch.linspace(-1, 1, 16) if levels else None)


def bank(bits: int = 4, bias: bool = True, activation: str = "swiglu", levels: bool = False) -> PackedWeights:
    wide = 2 * F if activation == "swiglu" else F
    biases = (torch.randn(E, wide, generator=torch.Generator().manual_seed(3)), torch.randn(E, D)) if bias else ()
    up = some(E, wide, D, bits=bits, group=8, levels=levels)
    return PackedWeights(up, some(E, D, F, bits=bits, group=8, levels=levels, seed=1), *biases, activation=activation)


def routed(tokens: int, experts: list[int] | None = None) -> Routing:
    chosen = torch.tensor(experts or range(E))
    index_TK = torch.stack(
        (chosen[torch.arange(tokens) % len(chosen)], chosen[torch.arange(1, tokens + 1) % len(chosen)]), 1
    )
    return Routing.from_topk(index_TK, torch.rand(tokens, 2) + 0.1, num_experts=E)


@pytest.mark.parametrize("rows", [1, 2, 7, 65])
@pytest.mark.parametrize(("bits", "levels"), [(8, False), (4, False), (4, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_a_map_is_its_weights_written_out(rows, bits, levels, dtype, bias):
    weight = some(12, 32, bits=bits, group=8, levels=levels)
    x, b = torch.randn(rows, 32, dtype=dtype), torch.randn(12, dtype=dtype) if bias else None
    found, wanted = packed_linear(x, weight, b), x.double() @ weight.dequantised(torch.float64).t()
    wanted = wanted if b is None else wanted + b.double()
    assert found.dtype == dtype
    assert torch.allclose(found.double(), wanted, atol={torch.bfloat16: 0.2, torch.float32: 1e-4}.get(dtype, 1e-12))


def test_gradients_go_through_a_map():
    weight, x = some(12, 32, bits=4, group=8), torch.randn(2, 3, 32, requires_grad=True)
    packed_linear(x, weight).sum().backward()
    assert torch.allclose(x.grad, weight.dequantised().sum(0).expand_as(x), atol=1e-5)


@pytest.mark.parametrize("group", [8, 32])  # of 32 the codes could be read as they lie
def test_gradients_go_through_experts_and_to_no_scale(group):
    up, down = some(E, 64, 32, bits=4, group=group), some(E, 32, 32, bits=4, group=group, seed=1)
    up.scale.requires_grad_()
    assert not up.dequantised().requires_grad
    weights, routing = PackedWeights(up, down), routed(3)
    x, same = (torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    packed_experts(x, routing, weights).square().sum().backward()
    packed_reference(same, routing, weights).square().sum().backward()
    assert x.grad.any() and torch.allclose(x.grad, same.grad, rtol=1e-4, atol=1e-3 * float(same.grad.abs().max()))
    assert up.scale.grad is None


def test_weights_are_written_out_in_fp32_and_rounded_once():
    """Scales in another dtype than the weights are read in."""
    value = torch.tensor([[3, -7, 5, 1]])
    matrix = Packed.of(value, torch.tensor([[1.00390625, 0.33333334]]), group=2, bits=4)
    exact = value.float() * matrix.scale.repeat_interleave(2, 1)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(matrix.dequantised(dtype), exact.to(dtype))
    assert matrix.bits_per_weight == 4 + 2 * 32 / 4 and matrix.memory_bytes == 2 + 8


def test_a_map_of_other_inputs_is_refused():
    with pytest.raises(ShapeError, match="32 inputs"):
        packed_linear(torch.ones(2, 16), some(12, 32, bits=4, group=8))


@pytest.mark.parametrize("once", [1, 600, 1 << 24])
@pytest.mark.parametrize("experts", [None, [3], [0, 4]])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(
    ("bits", "bias", "activation", "levels"),
    [(4, True, "swiglu", False), (8, False, "gelu", False), (4, False, "relu", True)],
)
def test_experts_are_the_reference(monkeypatch, once, experts, tokens, bits, bias, activation, levels):
    monkeypatch.setattr(packed, "_ONCE", once)
    weights, routing, x_TD = bank(bits, bias, activation, levels), routed(tokens, experts), torch.randn(tokens, D)
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        found = packed_experts(x_TD.to(dtype), routing, weights)
        wanted = packed_reference(x_TD.to(dtype), routing, weights)
        assert found.dtype == dtype and torch.allclose(found, wanted, atol=close, rtol=close)


def test_nobody_taken_is_nothing_written_out(monkeypatch):
    routing = Routing.from_topk(torch.zeros(0, 1, dtype=torch.long), torch.ones(0, 1), num_experts=E)
    assert packed_experts(torch.ones(0, D), routing, bank()).shape == (0, D)


@pytest.mark.parametrize("rows", [3, 65])
def test_a_bias_in_fp32_is_taken_by_both_ways(rows):
    """As few rows are from their codes, so are many, whose weights are written out in the rows' dtype."""
    weight, x, b = some(12, 32, group=8, bits=4), torch.randn(rows, 32).bfloat16(), torch.randn(12)
    want = x.float() @ weight.dequantised().t() + b
    got = packed_linear(x, weight, b)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2 * float(want.abs().max()))
