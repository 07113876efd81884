"""Products of many rows with experts' matrices as they lie, and sums of outer products, equal those in float64."""

import dataclasses

import pytest
import torch
import torch.utils.flop_counter

from turnout.run import sort
from turnout.run.compiled.broads import broads, outers, suits_broads, suits_outers
from turnout.run.compiled.dots import dots, suits_dots
from turnout.run.product import linear
from turnout.run.reference import reference
from turnout.run.tiled import suits_tiles, tiled_map
from turnout.run.tuned import as_tuned, tuning
from turnout.types import ExpertWeights, Routing

pytestmark = pytest.mark.usefixtures("compiled")
NEAR = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
# Which experts have how many rows: fewer than a tile, whole tiles, some more, and more than are passed at once.
EXPERTS, COUNTS = [0, 2, 3, 5, 6, 7], [1, 3, 4, 7, 26, 80]
BOUND = [100 + sum(COUNTS[:g]) for g in range(len(COUNTS) + 1)]


def able(dtype):
    if not suits_dots(torch.ones(1, 32, dtype=dtype), torch.ones(1, 4, 32, dtype=dtype).transpose(1, 2)):
        pytest.skip("this processor lacks the vectors")


def rows(width, dtype, seed):
    return torch.randn(sum(COUNTS), width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parts(row_ND):
    return row_ND.split(COUNTS)


def near(found, wanted):
    assert float((found.double() - wanted).norm() / wanted.norm()) < NEAR[found.dtype]


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize(("ins", "outs"), [(32, 4), (96, 68), (512, 136)])
def test_rows_with_matrices_stored_out_in(dtype, ins, outs):
    able(dtype)
    x, made = rows(ins, dtype, 1), torch.full((sum(COUNTS), outs), torch.nan, dtype=dtype)
    stack = torch.randn(8, outs, ins, generator=torch.Generator().manual_seed(2)).to(dtype).transpose(1, 2)
    assert suits_dots(x, stack) and not suits_dots(x, stack.contiguous())
    dots(x, stack, EXPERTS, BOUND, made)
    near(made, torch.cat([a.double() @ stack[e].double() for e, a in zip(EXPERTS, parts(x), strict=True)]))


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize(("ins", "outs"), [(2, 64), (34, 72), (512, 200)])
def test_rows_with_matrices_stored_in_out(dtype, ins, outs):
    able(dtype)
    x, made = rows(ins, dtype, 1), torch.full((sum(COUNTS), outs), torch.nan, dtype=dtype)
    stack = torch.randn(8, ins, outs, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert suits_broads(x, stack) and not suits_broads(x, stack.transpose(1, 2).contiguous().transpose(1, 2))
    broads(x, stack, EXPERTS, BOUND, made)
    near(made, torch.cat([a.double() @ stack[e].double() for e, a in zip(EXPERTS, parts(x), strict=True)]))


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize(("outs", "ins"), [(6, 64), (20, 72), (136, 200)])
def test_outer_products(dtype, outs, ins):
    able(dtype)
    left, right, grad = rows(outs, dtype, 1), rows(ins, dtype, 2), torch.full((8, outs, ins), torch.nan, dtype=dtype)
    assert suits_outers(left, right, grad, max(COUNTS))
    outers(left, right, EXPERTS, BOUND, grad)
    near(
        grad[EXPERTS],
        torch.stack([a.double().t() @ b.double() for a, b in zip(parts(left), parts(right), strict=True)]),
    )
    assert grad[[1, 4]].isnan().all()  # nothing else is written to


@pytest.mark.parametrize("dtype", NEAR)
def test_bits_depend_neither_on_neighbours_nor_on_threads(dtype):
    able(dtype)
    x, y = rows(64, dtype, 1), rows(128, dtype, 2)
    stack = torch.randn(8, 128, 64, generator=torch.Generator().manual_seed(2)).to(dtype)

    def all_of(experts, bound, x, y):
        found = torch.empty(len(x), 128, dtype=dtype), torch.empty(len(x), 64, dtype=dtype), torch.zeros_like(stack)
        dots(x, stack.transpose(1, 2), experts, bound, found[0])
        broads(y, stack, experts, bound, found[1])
        outers(y, x, experts, bound, found[2])
        return found

    before, wanted = torch.get_num_threads(), all_of(EXPERTS, BOUND, x, y)
    try:
        torch.set_num_threads(3)
        for a, b in zip(all_of(EXPERTS, BOUND, x, y), wanted, strict=True):
            assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)
    alone = all_of(EXPERTS[-1:], BOUND[-2:], x[-80:], y[-80:])
    assert torch.equal(alone[0], wanted[0][-80:]) and torch.equal(alone[1], wanted[1][-80:])
    assert torch.equal(alone[2][7], wanted[2][7])


def test_a_map_of_many_rows():
    able(torch.float32)
    g = torch.Generator().manual_seed(6)
    x, weight, bias = (torch.randn(size, generator=g) for size in ((3, 50, 96), (68, 96), (68,)))
    with as_tuned(dataclasses.replace(tuning(), tiled_rows=150, onednn=None)):
        for given in ((x, weight, None), (x, weight, bias), (x.transpose(0, 1), weight, bias.repeat(2)[::2])):
            found = tiled_map(*given)
            assert torch.equal(linear(*given), found) and found.shape == (*given[0].shape[:2], 68)
            exact = torch.nn.functional.linear(*(None if one is None else one.double() for one in given))
            near(found, exact)
        assert tiled_map(x[:1], weight, bias) is None  # few rows
        assert tiled_map(torch.cat((x, x)), weight, bias) is None  # more than the tuning says
        assert tiled_map(x.bfloat16(), weight.bfloat16(), None) is None and tiled_map(x, weight.double(), None) is None
        assert tiled_map(x, weight.t().contiguous().t(), None) is None and tiled_map(x, weight, bias[:4]) is None
        assert tiled_map(x, weight.clone().requires_grad_(), None) is None
        assert tiled_map(x, weight.to_sparse(), None) is None
        assert tiled_map(torch.ones(80, 1040), torch.ones(4, 1040), None) is None  # long
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            linear(x, weight)
        assert counter.get_total_flops() == 2 * 150 * 96 * 68


def test_what_they_do_not_take():
    able(torch.float32)
    x, stack = torch.ones(8, 32), torch.ones(2, 64, 32).transpose(1, 2)
    assert suits_dots(x, stack)
    assert not suits_dots(x.half(), stack.half()) and not suits_dots(x.bfloat16(), stack)
    assert not suits_dots(torch.ones(32, 8).t(), stack) and not suits_dots(x, stack[:, :, :62])
    assert not suits_dots(torch.ones(8, 24), torch.ones(2, 64, 24).transpose(1, 2))  # no whole vectors
    assert not suits_broads(torch.ones(8, 64), torch.ones(2, 64, 63))
    assert not suits_broads(torch.ones(8, 5000), torch.ones(2, 5000, 64))  # more than the cache holds
    assert not suits_broads(torch.ones(8, 33).bfloat16(), torch.ones(2, 33, 64).bfloat16())
    assert not suits_outers(x, torch.ones(8, 64), torch.ones(2, 32, 64), 5000)
    assert not suits_outers(x, torch.ones(8, 64), torch.ones(2, 64, 32).transpose(1, 2), 8)


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("stored", ["(out, in)", "(in, out)"])
@pytest.mark.parametrize("group", [1, 1 << 10, 1 << 19])
def test_a_layer_by_them_is_the_reference_with_its_gradients(dtype, stored, group):
    able(dtype)
    T, D, E, K, F = 70, 64, 9, 2, 64
    g = torch.Generator().manual_seed(5)

    def leaf(*shape):
        return (torch.randn(shape, generator=g) * 0.3).to(dtype).requires_grad_()

    x_TD, weight_TK = leaf(T, D), torch.rand(T, K, generator=g).requires_grad_()
    up, down = (leaf(E, 2 * F, D), leaf(E, D, F)) if stored == "(out, in)" else (leaf(E, D, 2 * F), leaf(E, F, D))
    index_TK = torch.rand(T, E - 1, generator=g).topk(K).indices  # the last expert has none
    grad_TD = torch.randn(T, D, generator=g).to(dtype)
    limits = {"tiled_rows": 1 << 20, "tiled_rows_short": 1 << 20, "compiled_rows": 0, "group": group}

    def by(executor, cast):
        tensors = [one.detach().to(cast).requires_grad_() for one in (x_TD, up, down)] + [
            weight_TK.detach().requires_grad_()
        ]
        stacks = [one.transpose(1, 2) if stored == "(out, in)" else one for one in tensors[1:3]]
        weights = ExpertWeights(*stacks)
        y = executor(tensors[0], Routing.from_topk(index_TK, tensors[3], num_experts=E), weights)
        y.backward(grad_TD.to(cast))
        return [y.detach(), *(one.grad for one in tensors)], weights

    with as_tuned(dataclasses.replace(tuning(), **limits)):
        found, weights = by(sort, dtype)
        assert suits_tiles(x_TD, weights, 2 * T / E)
    wanted, _ = by(reference, torch.float64)
    for a, b in zip(found, wanted, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < (2e-6 if dtype == torch.float32 else 1.5e-2)
