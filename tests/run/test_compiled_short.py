"""Rows that are rounded to bfloat16 once, and meet weights of every format in it: as near as sums in fp32 are."""

import numpy as np
import pytest
import torch

from turnout.run.compiled import rows_times
from turnout.run.compiled.engine import array, kernel
from turnout.run.compiled.experts import experts_times
from turnout.run.compiled.formats import meets_short
from turnout.run.compiled.order import BYTES, NIBBLES, PARTED, PLAIN, SHORT, close, lay_out, place
from turnout.types import ExpertWeights, Packed, Routing

pytestmark = pytest.mark.usefixtures("compiled")

HALF = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
MX = torch.cat((HALF, -HALF))
# By name: bits, group (0 for a row), scales' dtype, levels.
FORMATS = {
    "bf16": None,
    "int8 a row": (8, 0, torch.float32, None),
    "int8 of 32": (8, 32, torch.float16, None),
    "int8 of 96": (8, 96, torch.bfloat16, None),
    "int4 a row": (4, 0, torch.bfloat16, None),
    "int4 of 32": (4, 32, torch.float16, None),
    "int4 of 64": (4, 64, torch.float32, None),
    "int4 of 96": (4, 96, torch.float32, None),
    "int4 of 256": (4, 256, torch.float32, None),
    "MXFP4": (4, 32, torch.bfloat16, MX),
    "not in bfloat16": (4, 32, torch.float32, MX / 6),
}


def some_of(name: str, outs: int, ins: int, seed: int) -> torch.Tensor | Packed:
    g = torch.Generator().manual_seed(seed)
    if FORMATS[name] is None:
        return torch.randn(outs, ins, generator=g).bfloat16()
    bits, group, dtype, levels = FORMATS[name]
    code = torch.randint(0, 256, (outs, ins * bits // 8), generator=g, dtype=torch.uint8)
    scale = torch.randn(outs, ins // (group or ins), generator=g).to(dtype)  # of either sign
    return Packed(code if bits == 4 else code.view(torch.int8), scale, group or ins, bits, levels)


def written_out(weight: torch.Tensor | Packed) -> torch.Tensor:
    return weight.dequantised() if isinstance(weight, Packed) else weight


def sizes_of(name: str, seed: int) -> list[tuple[int, int, int]]:
    """Random rows, outputs and inputs that the format divides."""
    g = np.random.default_rng(seed)
    unit = (FORMATS[name] or (0, 0))[1] or 2
    most = max(2, 700 // unit)
    return [(int(g.integers(1, 14)), int(g.integers(1, 80)), unit * int(g.integers(1, most))) for _ in range(12)]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_over_random_sizes(name: str) -> None:
    for seed, (rows, outs, ins) in enumerate(sizes_of(name, seed=7)):
        x = torch.randn(rows, ins, generator=torch.Generator().manual_seed(seed)).bfloat16()
        weight = some_of(name, outs, ins, 100 + seed)
        full, said = written_out(weight), f"seed {seed}: {rows} rows, {outs} outputs, {ins} inputs"
        want = x.double() @ full.double().t()
        got, size = rows_times(x, weight).double(), x.double().abs() @ full.double().abs().t()
        # Half a unit of the result's own bfloat16, and what fp32 loses on the way.
        assert bool(((got - want).abs() <= want.abs() * 2**-8 + size * 2e-6).all()), said
        torchs = torch.nn.functional.linear(x, full.bfloat16()).double()
        assert float((got - want).norm()) <= 1.001 * float((torchs - want).norm()) + 1e-12, said


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_has_the_same_bits_alone_in_a_batch_and_on_two_threads(name: str) -> None:
    before, ins = torch.get_num_threads(), 768
    x, weight = torch.randn(15, ins, generator=torch.Generator().manual_seed(1)).bfloat16(), some_of(name, 150, ins, 2)
    found = rows_times(x, weight)
    for row in range(15):
        assert torch.equal(rows_times(x[row : row + 1], weight)[0], found[row])
    try:
        torch.set_num_threads(2)
        assert torch.equal(rows_times(x, weight), found)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai", "gelu"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_rounds_what_comes_and_what_is_activated(name: str, activation: str) -> None:
    """And nothing else: against fp64 of the same two roundings."""
    experts, width, hidden, tokens = 5, 768, 192 if name != "int4 of 256" else 256, 7
    outs, gated = hidden * (1 if activation == "gelu" else 2), activation != "gelu"
    ups = [some_of(name, outs, width, seed) for seed in range(experts)]
    downs = [some_of(name, width, hidden, 10 + seed) for seed in range(experts)]
    up, down = stacked(ups, 0.02), stacked(downs, 0.02)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, width, generator=g).bfloat16()
    weight_TK, index_TK = torch.rand(tokens, experts, generator=g).topk(2)
    routing = Routing.from_topk(index_TK, weight_TK, num_experts=experts)
    biases = torch.randn(experts, outs, generator=g), torch.randn(experts, width, generator=g)
    interleaved = gated and name == "MXFP4"
    got = experts_times(x, routing, up, down, *biases, activation=activation, interleaved=interleaved)
    from turnout.run import activate

    want = torch.zeros(tokens, width, dtype=torch.float64)
    for t in range(tokens):
        for weight, e in zip(weight_TK[t], index_TK[t].tolist(), strict=True):
            h = x[t].double() @ written_out(up[e]).double().t() + biases[0][e]
            a = activate(h[None], activation, interleaved=interleaved)[0]
            a = a.bfloat16() if meets_short(up, torch.bfloat16) else a
            want[t] += weight.double() * (a.double() @ written_out(down[e]).double().t() + biases[1][e])
    assert float((got.double() - want).norm() / want.norm()) < 2.5e-3


def stacked(weights: list[torch.Tensor | Packed], size: float) -> torch.Tensor | Packed:
    first = weights[0]
    if isinstance(first, torch.Tensor):
        return torch.stack([one * size for one in weights])
    code, scale = (torch.stack([getattr(one, name) for one in weights]) for name in ("code", "scale"))
    return Packed(code, scale * size, first.group, first.bits, first.levels)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_number_stays_with_its_row(name: str) -> None:
    ins = 192 if name != "int4 of 256" else 512
    x, weight = torch.randn(5, ins, generator=torch.Generator().manual_seed(1)).bfloat16(), some_of(name, 9, ins, 2)
    clean = rows_times(x, weight)
    x[1, ins - 1], x[3, 0] = torch.nan, torch.inf
    got, full = rows_times(x, weight), written_out(weight)
    assert got[1].isnan().all() and torch.equal(got[[0, 2, 4]], clean[[0, 2, 4]])
    met = full[:, 0]
    assert got[3][met == 0].isnan().all()
    assert torch.equal(got[3][met != 0].float(), torch.inf * met[met != 0].float().sign())


def test_numbers_below_those_of_full_precision_count_as_zero_at_most() -> None:
    """The processor's product of pairs takes them for 0: nothing that is off by more than so many of them."""
    for name in FORMATS:
        x, weight = torch.full((2, 512), 2.0**-130).bfloat16(), some_of(name, 6, 768, 2)
        x = torch.cat((x, torch.zeros(2, 256).bfloat16()), 1)
        x[1, :5] = 1
        full = written_out(weight).double()
        off = (rows_times(x, weight).double() - x.double() @ full.t()).abs()
        assert float(off[0].max()) <= 768 * float(full.abs().max().clamp_min(1)) * 2.0**-126
        assert float((off[1] - (x[1].double() @ full.t()).abs() * 2**-8).max()) <= 1e-5 * float(full.abs().max())


def test_which_weights_meet_rows_in_bfloat16() -> None:
    able = meets_short(torch.ones(2, 32).bfloat16(), torch.bfloat16)
    for name in FORMATS:
        weight = some_of(name, 4, 768, 1)
        if "int8" not in name:  # needs more of a processor
            assert meets_short(weight, torch.bfloat16) == (able and name != "not in bfloat16"), name
        assert not meets_short(weight, torch.float32) and not meets_short(weight, torch.float16)


@kernel(exact=True)
def laid(x_N, first, room, ins, order):
    close(room, ins, order)
    lay_out(x_N, first, room, order)


@kernel(exact=True)
def placed(place_N, order):
    for n in range(place_N.shape[0]):
        place_N[n] = place(n, order)


@pytest.mark.parametrize("order", [PLAIN, PARTED, SHORT, BYTES, NIBBLES])
def test_parts_of_rows_come_where_they_belong(order: int) -> None:
    size, kind = 768, np.uint16 if order >= SHORT else np.float32
    place_N = np.empty(size, np.int64)
    placed(place_N, order)
    assert sorted(place_N) == list(range(size))
    g = np.random.default_rng(3)
    for _ in range(30):
        first, ins = int(g.integers(0, 200)), int(g.integers(200, 500))
        x = torch.from_numpy(g.standard_normal(ins - first).astype(np.float32)).bfloat16()
        room, want = np.full(size, 7, kind), np.full(size, 7, kind)
        laid(array(x.float()), first, room, ins, order)
        numbers = array(x) if order >= SHORT else x.float().numpy()
        block = {BYTES: 64, NIBBLES: 128}.get(order, 32)
        want[place_N[ins : -(-ins // block) * block]] = 0
        want[place_N[first:ins]] = numbers
        assert np.array_equal(room, want), (first, ins)


def test_a_bank_in_16_bits_with_experts_that_nobody_takes() -> None:
    g = torch.Generator().manual_seed(0)
    up, down = torch.randn(4, 6, 33, generator=g).bfloat16(), torch.randn(4, 33, 3, generator=g).bfloat16()
    up[2], down[2] = torch.nan, torch.nan
    x, routing = (
        torch.randn(3, 33, generator=g).bfloat16(),
        Routing.from_topk(torch.tensor([[0, 1], [1, 3], [0, 3]]), torch.rand(3, 2, generator=g), num_experts=4),
    )
    got = experts_times(x, routing, up, down)
    from turnout.run import execute

    kept = ExpertWeights(up.nan_to_num().double().mT, down.nan_to_num().double().mT)
    want = execute(x.double(), routing, kept, backend="reference")
    assert float((got.double() - want).norm() / want.norm()) < 4e-3
