"""The pieces of the compiled step, each against torch."""

import numpy as np
import pytest
import torch

from turnout.decide import token
from turnout.models.norm import LayerNorm, RMSNorm
from turnout.run import activate
from turnout.run.compiled.curves import ACTIVATIONS, activated, bounded, grown
from turnout.run.compiled.engine import array, kernel
from turnout.run.compiled.formats import blocks, meets_short
from turnout.run.compiled.kept import Kept
from turnout.run.compiled.look import looked, softened, stored
from turnout.run.compiled.norms import normed, turned
from turnout.run.compiled.route import chosen
from turnout.run.compiled.tables import CODES, LAYER, NORM, PAGE
from turnout.run.compiled.times import laid_out, times
from turnout.types import Packed

pytestmark = pytest.mark.usefixtures("compiled")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@kernel()
def of_each(kind, x_N, out_N):
    for n in range(x_N.shape[0]):
        out_N[n] = grown(x_N[n]) if kind == 0 else bounded(x_N[n])


@kernel()
def stored_at(code, address, x_N):
    stored(code, address, x_N)


@kernel()
def normed_by(norms, x_I, out_I):
    normed(norms[0], x_I, out_I)


@kernel()
def times_all(table, e, x_MI, room, out_MO):
    middle, wide_MI = out_MO.shape[1] // 2, laid_out(table, 0, x_MI, room)
    times(table, 0, e, wide_MI, out_MO, middle, out_MO.shape[1])
    times(table, 0, e, wide_MI, out_MO, 0, middle)


@kernel()
def looked_at(table, start, page_P, first, end, q_GW, sinks, softcap, scale, score_GT, out_GV, room):
    q_GW = laid_out(table, 0, q_GW, room)
    looked(table, 0, 1, start, page_P, first, end, q_GW, sinks, softcap, scale, score_GT, out_GV)


@kernel()
def chosen_by(layers, logit_E, choice_K, weight_K, rank):
    chosen(layers[0], logit_E, choice_K, weight_K, rank)


def test_exponentials_are_right_to_the_last_digits_and_keep_what_is_no_number() -> None:
    x = torch.cat((torch.linspace(-87.2, 88.7, 20_001), draw(1000), torch.tensor([-np.inf, -1e4, 0.0, 1e4, np.inf])))
    got = torch.empty_like(x)
    of_each(0, array(x), array(got))
    torch.testing.assert_close(got.double(), x.double().exp().float().double(), rtol=6e-7, atol=2e-38)
    of_each(1, array(x), array(got))
    torch.testing.assert_close(got, x.tanh(), rtol=0, atol=3e-7)
    for kind in (0, 1):
        nothing = torch.full((1,), torch.nan)
        of_each(kind, array(nothing), array(nothing))
        assert nothing.isnan().all()


@pytest.mark.parametrize("dtype", CODES)
def test_numbers_are_stored_as_torch_rounds_them(dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31, (20_000,), generator=torch.Generator().manual_seed(0)).int()
    x = torch.cat((bits.view(torch.float32), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, np.inf, -np.inf, torch.nan, 0.0])))
    got = torch.empty(len(x), dtype=dtype)
    stored_at(CODES[dtype], got.data_ptr(), array(x))
    torch.testing.assert_close(got, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    gated = name in ACTIVATIONS[:5]
    wide = 6 * draw(3, 2 * 37 if gated else 37)
    want = activate(wide, name)
    activated(array(wide), ACTIVATIONS.index(name), 0, 20, 37)
    activated(array(wide), ACTIVATIONS.index(name), 20, 37, 37)
    torch.testing.assert_close(wide[:, :37], want, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("norm", [RMSNorm(33, 1e-3), RMSNorm(33, 1e-3, plus_one=True), LayerNorm(33, 1e-3)])
@torch.no_grad()
def test_norms(norm) -> None:
    for seed, parameter in enumerate(norm.parameters()):
        parameter.copy_(draw(33, seed=seed))
    kept, x, got = Kept(), draw(33, seed=5) + 2, torch.empty(33)
    weight = kept.wide(norm.weight, float(getattr(norm, "plus_one", 0)))
    table = np.array([(weight, kept.wide(getattr(norm, "bias", None)), isinstance(norm, LayerNorm), norm.eps)], NORM)
    normed_by(table, array(x), array(got))
    torch.testing.assert_close(got, norm(x), rtol=1e-6, atol=1e-6)


def test_a_head_is_turned_in_part() -> None:
    head, cos, sin = draw(10), draw(3, seed=1), draw(3, seed=2)
    a, b = head[:3].clone(), head[3:6].clone()
    want = torch.cat((a * cos - b * sin, b * cos + a * sin, head[6:]))
    turned(array(head), array(cos), array(sin))
    torch.testing.assert_close(head, want)


@pytest.mark.parametrize("dtype", list(CODES))
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16])
def test_products_of_either_order(rows: int, dtype: torch.dtype) -> None:
    for outs, ins in ((1, 1), (5, 33), (66, 19)):
        x_MI, stack = draw(rows, ins), draw(3, outs, ins, seed=1).to(dtype)
        bias, got = draw(3, outs, seed=2).to(dtype), torch.empty(rows, outs)
        other = stack.transpose(1, 2).contiguous().transpose(1, 2)
        part = draw(3, outs, ins + 4, seed=3).to(dtype)[:, :, :ins].copy_(stack)  # rows with something in between
        for weight in (stack, other, part):
            for added in (bias, None):
                kept = Kept()
                table = np.array([kept.matrix(weight, added)], np.int64)
                times_all(table, 2, array(x_MI), array(torch.full((rows * blocks(ins),), torch.nan)), array(got))
                short = weight.stride(-1) == 1 and meets_short(weight, dtype)  # rows are rounded as transformers does
                met = x_MI.bfloat16() if short else x_MI
                want = met.double() @ stack[2].double().t() + (0 if added is None else added[2].double())
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_products_with_codes(rows: int, bits: int, dtype: torch.dtype) -> None:
    for outs, ins, group in ((5, 34, 34), (66, 96, 32), (7, 640, 64)):
        code = torch.randint(0, 256, (3, outs, ins * bits // 8), generator=torch.Generator().manual_seed(2)).byte()
        weight = Packed(code if bits == 4 else code.view(torch.int8), draw(3, outs, ins // group, seed=4), group, bits)
        kept, x_MI, got = Kept(dtype), draw(rows, ins), torch.empty(rows, outs)
        table = np.array([kept.matrix(weight)], np.int64)
        times_all(table, 2, array(x_MI), array(torch.full((rows * blocks(ins),), torch.nan)), array(got))
        met = x_MI.bfloat16() if meets_short(weight, dtype) else x_MI
        want, size = met.double() @ weight.dequantised()[2].double().t(), float(weight.dequantised().abs().max())
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6 * size * ins)


ROUTERS = {
    "topk": (token.TopK, {"top_k": 3, "bias": True}),
    "topk as it is": (token.TopK, {"top_k": 3, "renormalize": False}),
    "switch": (token.Switch, {"top_k": 1}),
    "gshard": (token.GShard, {}),
    "loss-free": (token.LossFree, {"top_k": 3, "scores": "softmax", "renormalize": True}),
    "groups": (token.GroupLimited, {"top_k": 3, "num_groups": 4, "top_groups": 2, "scale": 2.5}),
    "groups by their best": (
        token.GroupLimited,
        {"top_k": 3, "num_groups": 4, "top_groups": 2, "scores": "softmax", "group_score": "max", "bias": False},
    ),
    "groups of one": (token.GroupLimited, {"top_k": 3, "num_groups": 12, "top_groups": 5}),
}


@pytest.mark.parametrize("name", ROUTERS)
@torch.no_grad()
def test_routers(name: str) -> None:
    from turnout.models.decoding.entries import router_entries

    kind, options = ROUTERS[name]
    router = kind(7, 12, std=1.0, generator=torch.Generator().manual_seed(0), **options).eval()
    for key, tensor in (*router.named_parameters(), *router.named_buffers()):
        if key in ("bias", "bias_E"):
            tensor.copy_(draw(12, seed=4) / 3)
    x_TD = draw(40, 7, seed=1)
    x_TD[0] = 0  # all are equal
    kept, layer = Kept(), np.zeros(1, LAYER)
    router_entries(layer[0], router, kept)
    bias = router.bias if isinstance(router, token.TopK) and router.bias is not None else torch.zeros(12)
    dense_TE = torch.zeros(40, 12)
    for row, x_D in enumerate(x_TD):
        choice, weight = np.empty(router.top_k, np.int64), np.empty(router.top_k, np.float32)
        chosen_by(layer, array(torch.nn.functional.linear(x_D, router.weight, bias)), choice, weight, 0)
        dense_TE[row, torch.from_numpy(choice)] = torch.from_numpy(weight)
    torch.testing.assert_close(dense_TE, router(x_TD).dense(), rtol=1e-5, atol=1e-6)
    for rank in (1, 2, 4):
        index_T1, weight_T1 = router.chosen(router.scored(x_TD)[1], rank=rank)
        for row, x_D in enumerate(x_TD):
            logit = array(torch.nn.functional.linear(x_D, router.weight, bias))
            choice, weight = np.empty(router.top_k, np.int64), np.empty(router.top_k, np.float32)
            chosen_by(layer, logit, choice, weight, rank)
            assert choice.tolist() == [int(index_T1[row]), *[-1] * (router.top_k - 1)]
            torch.testing.assert_close(weight[0].item(), weight_T1[row].item(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", list(CODES))
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_attention_over_pages(sinks: bool, softcap: float, dtype: torch.dtype) -> None:
    """Of the second of two heads, whose pages lie in any order, and nothing is read but what is seen."""
    shapes = ((1, 0, 1, 4), (3, 0, 9, 10), (6, 0, 70, 16), (2, 3, 5, 1), (4, 60, 190, 16), (2, 130, 320, 8))
    for heads, first, end, width in shapes:
        q, keys, values = draw(heads, width), draw(320, width, seed=1).to(dtype), draw(320, width, seed=2).to(dtype)
        sink = draw(heads, seed=3) if sinks else torch.empty(0)
        found, seen = [], end - first
        for pages in ([0, 1, 2, 3, 4], [5, 6, 1, 2, 0], [4, 3, 2, 1, 0], [7, 0, 1, 2, 3]):
            held = torch.full((2, 2, 8 * PAGE, width), torch.nan, dtype=dtype)
            for place in range(first, end):
                slot = pages[place // PAGE] * PAGE + place % PAGE
                held[0, 1, slot], held[1, 1, slot] = keys[place], values[place]
            score, got = torch.empty(heads, seen), torch.full((heads, width), torch.nan)
            kept, room = Kept(), torch.empty(heads * blocks(width))
            at, page_P = np.array(kept.slots(held[0], held[1]), np.int64), np.array(pages)
            given = array(q), array(sink), np.float32(softcap), np.float32(0.4), array(score), array(got), array(room)
            looked_at(at, 8 * PAGE, page_P, first, end, *given)
            found.append(torch.cat((score, got), 1))
        assert all(torch.equal(one, found[0]) for one in found), "where pages lie shows"
        met = q.bfloat16() if meets_short(keys, dtype) else q
        want = met.double() @ keys[first:end].double().t() * 0.4
        want = softcap * (want / softcap).tanh() if softcap else want
        share = torch.cat((want, sink[:, None].double()), 1).softmax(1)[:, :seen] if sinks else want.softmax(1)
        torch.testing.assert_close(score.double(), share, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got.double(), share @ values[first:end].double(), rtol=1e-4, atol=2e-6)


def test_far_scores_do_not_overflow() -> None:
    score = torch.tensor([500.0, -500.0, 499.0])
    softened(array(score), np.float32(-np.inf), np.float32(0), np.float32(1))
    torch.testing.assert_close(score, torch.tensor([500.0, -500.0, 499.0]).softmax(0))
