"""Many rows against matrices in few bits that are written out in panels, to the bits of those written out whole."""

import dataclasses

import pytest
import torch

from turnout.errors import ShapeError
from turnout.run import packed, packed_experts, packed_linear, packed_reference
from turnout.run.compiled.dots import dots
from turnout.run.compiled.panels import panel_products, suits_panels
from turnout.run.tuned import as_tuned, tuning
from turnout.types import Packed, PackedWeights, Routing

pytestmark = pytest.mark.usefixtures("compiled")
DTYPES = [torch.float32, torch.bfloat16]
EXPERTS, COUNTS = [0, 2, 3, 5], [1, 3, 6, 141]  # fewer rows than a tile has, some more, and more than pass at once
BOUND = [100 + sum(COUNTS[:g]) for g in range(len(COUNTS) + 1)]
KINDS = ["int8", "int4", "levels"]


def some(kind, *shape, group, scale=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    bits, levels = (8 if kind == "int8" else 4), kind == "levels"
    low, high = (0, 16) if levels else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    value, each = torch.randint(low, high, shape, generator=g), (*shape[:-1], shape[-1] // group)
    if scale == torch.float8_e8m0fnu:
        real = (2.0 ** torch.randint(-4, 1, each, generator=g)).to(scale)
    else:
        real = ((torch.rand(each, generator=g) - 0.5) / high).to(scale)  # negative ones too
    table = torch.randn(16, generator=g) if levels else None
    return Packed.of(value, real, group=group, bits=bits, levels=table)


def randn(*shape, dtype, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def able(dtype):
    if not suits_panels(torch.ones(1, 32, dtype=dtype), some("int8", 4, 32, group=32)):
        pytest.skip("this processor lacks the vectors")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ins", "outs", "group"), [(32, 4, 32), (96, 68, 96), (256, 136, 64), (512, 72, 128)])
def test_the_bits_are_those_of_matrices_written_out(dtype, kind, ins, outs, group):
    able(dtype)
    stack, x = some(kind, 6, outs, ins, group=group), randn(sum(COUNTS), ins, dtype=dtype)
    found, wanted = (torch.full((len(x), outs), torch.nan, dtype=dtype) for _ in range(2))
    assert suits_panels(x, stack)
    panel_products(x, stack, EXPERTS, BOUND, found)
    dots(x, stack.dequantised(dtype).transpose(1, 2), EXPERTS, BOUND, wanted)
    assert torch.equal(found, wanted) and not found.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float16])
def test_scales_of_any_dtype(dtype, scale):
    able(dtype)
    weight, x = some("int4", 8, 64, group=32, scale=scale), torch.eye(64, dtype=dtype)
    assert torch.equal(packed_linear(x, weight), weight.dequantised(dtype).t())


@pytest.mark.parametrize("kind", KINDS)
def test_as_near_as_torch_is_with_weights_rounded_once(kind):
    """Against fp64 of the weights as they were meant, not rounded to bfloat16."""
    able(torch.bfloat16)
    weight, x = some(kind, 256, 512, group=32), randn(300, 512, dtype=torch.bfloat16)
    exact = x.double() @ weight.dequantised(torch.float64).t()
    torchs = torch.nn.functional.linear(x, weight.dequantised(torch.float32).bfloat16())
    ours = packed_linear(x, weight)
    assert float((ours - exact).norm()) <= 1.01 * float((torchs - exact).norm())


def test_bits_depend_on_no_threads():
    able(torch.bfloat16)
    stack, x = some("int4", 6, 200, 64, group=32), randn(sum(COUNTS), 64, dtype=torch.bfloat16)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 7):
            torch.set_num_threads(threads)
            made.append(torch.full((len(x), 200), torch.nan, dtype=x.dtype))
            panel_products(x, stack, EXPERTS, BOUND, made[-1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_what_they_do_not_take():
    able(torch.float32)
    x, fits = torch.ones(8, 64), some("int4", 8, 64, group=32)
    assert suits_panels(x, fits)
    assert not suits_panels(x.half(), fits)
    assert not suits_panels(x, some("int4", 8, 64, group=16))  # no whole blocks
    assert not suits_panels(x, some("int4", 6, 64, group=32))  # no whole tile of outputs
    assert not suits_panels(torch.ones(8, 48), some("int8", 8, 48, group=48))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("ins", "outs", "group"), [(64, 12, 32), (40, 12, 40), (64, 6, 64), (48, 8, 16), (66, 3, 66)])
@pytest.mark.parametrize("bias", [None, "its own", torch.float32])
def test_a_map_of_many_rows_whatever_its_sizes(dtype, ins, outs, group, bias):
    weight, x = some("int8", outs, ins, group=group), randn(2, 70, ins, dtype=dtype)
    b = None if bias is None else randn(outs, dtype=dtype if bias == "its own" else bias, seed=2)
    near = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-5}
    for rows in (x, x.transpose(0, 1), x[:, ::2], x[..., :0].new_zeros(2, 0, ins)):
        want = rows.double() @ weight.dequantised(torch.float64).t() + (0 if b is None else b.double())
        found = packed_linear(rows, weight, b)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), want, **near)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("activation", "bias"), [("swiglu", torch.float32), ("gelu", None), ("swiglu_oai", "x's")])
def test_experts_are_the_reference(monkeypatch, dtype, kind, activation, bias):
    """Some experts have no rows, some few, one most; and no weights are written out as a whole."""
    able(dtype)
    E, D, F, T = 7, 64, 32, 150
    wide = 2 * F if "swiglu" in activation else F
    up, down = some(kind, E, wide, D, group=32), some(kind, E, D, F, group=32, seed=3)
    biases = [None, None]
    if bias is not None:
        biases = [randn(E, n, dtype=dtype if bias == "x's" else bias, seed=n) for n in (wide, D)]
    weights, g = PackedWeights(up, down, *biases, activation=activation), torch.Generator().manual_seed(4)
    index_TK = torch.tensor([[1, 3]]).repeat(T, 1)
    index_TK[: T // 3, 0], index_TK[0, 0] = 5, 0
    routing, x = Routing.from_topk(index_TK, torch.rand(T, 2, generator=g), num_experts=E), randn(T, D, dtype=dtype)
    wanted = packed_reference(x.double(), routing, weights)
    with monkeypatch.context() as patch, as_tuned(dataclasses.replace(tuning(), panel_rows=0, panel_rows_short=0)):
        patch.setattr(PackedWeights, "written_out", None)
        found = packed_experts(x, routing, weights)
        strided = packed_experts(x.t().contiguous().t(), routing, weights)
    assert found.dtype == dtype and torch.equal(found, strided)
    near = 1e-5 if dtype == torch.float32 else 2e-2
    assert float((found.double() - wanted).norm()) < near * float(wanted.norm())


def test_which_way_many_rows_go(monkeypatch):
    """Few from the codes, more in panels, and where gradients are wanted written out."""
    able(torch.bfloat16)
    weight, seen = some("int4", 8, 64, group=32), []
    for name in ("rows_times", "_by_panels", "_written_out"):
        whole = getattr(packed, name)
        monkeypatch.setattr(packed, name, lambda *a, n=name, w=whole: seen.append(n) or w(*a))
    with as_tuned(dataclasses.replace(tuning(), panel_rows=3, panel_rows_short=2)):
        for rows, dtype in ((3, torch.float32), (4, torch.float32), (2, torch.bfloat16), (3, torch.bfloat16)):
            packed_linear(torch.ones(rows, 64, dtype=dtype), weight)
        packed_linear(torch.ones(9, 64, requires_grad=True), weight).sum().backward()
        packed_linear(torch.ones(9, 64, dtype=torch.float64), weight)
        packed_linear(torch.ones(9, 64, dtype=torch.float16), weight)  # from the codes: no panels of it
    few, many, whole = "rows_times", "_by_panels", "_written_out"
    assert seen == [few, many, few, many, whole, whole, few]


def test_sizes_that_do_not_fit_are_refused():
    up, down = some("int8", 3, 64, 32, group=32), some("int8", 3, 32, 32, group=32)
    routing = Routing.from_topk(torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), num_experts=3)
    other = Routing.from_topk(torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), num_experts=2)
    packed_experts(torch.ones(4, 32), routing, PackedWeights(up, down))
    for x, of, weights in (
        (torch.ones(4, 31), routing, PackedWeights(up, down)),
        (torch.ones(5, 32), routing, PackedWeights(up, down)),
        (torch.ones(4, 32), other, PackedWeights(up, down)),
        (torch.ones(4, 32), routing, PackedWeights(up, down, activation="relu")),
    ):
        with pytest.raises(ShapeError, match="agree in T, D, E and F"):
            packed_experts(x, of, weights)
