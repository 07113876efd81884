"""Within ``batch_invariant`` a row has one output, to the bit, whoever shares its batch; what cannot, refuses."""

import importlib

import pytest
import torch

from turnout.decide import token
from turnout.errors import UsageError
from turnout.layers import MoE
from turnout.models import LM, LMConfig, MLAConfig, MoEConfig
from turnout.run import execute, packed_experts, packed_linear, reference
from turnout.solve.fixed_rows import fixed_linear, fixed_rows, fixed_tiles
from turnout.types import Packed, PackedWeights
from turnout.types.invariant import alike, batch_invariant

BATCHES = 40


@pytest.fixture(params=["kernels", "torch"])
def machine(request, monkeypatch):
    """With kernels that are compiled, where they are, and with torch alone."""
    if request.param == "torch":
        monkeypatch.setenv("TURNOUT_COMPILED", "0")
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def outputs(run, victim, seed=0, most=90):
    """How many different outputs a victim's rows have over 40 batches of other rows, before and after them."""
    chance, seen = torch.Generator().manual_seed(seed), set()
    for _ in range(BATCHES):
        count = int(torch.randint(most, (1,), generator=chance))
        others = torch.randn(count, *victim.shape[1:], generator=chance).to(victim.dtype)
        at = int(torch.randint(count + 1, (1,), generator=chance))
        y = run(torch.cat((others[:at], victim, others[at:])))[at : at + len(victim)]
        seen.add(y.contiguous().view(torch.uint8).numpy().tobytes())
    return len(seen)


SIZES = [(64, 32, 8), (100, 36, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_layer_of_experts(machine, threads, dtype, sizes):
    width, hidden, experts = sizes
    chance = torch.Generator().manual_seed(width)
    router = token.TopK(width, experts, std=width**-0.5, generator=chance)
    kinds = {"shared_hidden": 24, "shared_gate": True, "activation": "geglu", "bias": True} if width == 100 else {}
    layer = MoE(width, hidden, experts, router=router, std=width**-0.5, generator=chance, **kinds).to(dtype).eval()
    victim = torch.randn(3, width, generator=chance).to(dtype)
    with batch_invariant():
        assert outputs(lambda x: layer(x).output, victim) == 1
        x = torch.randn(70, width, generator=chance).to(dtype)
        routing = layer.route(x)
        near = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
        y = execute(x, routing, layer.bank.weights())
    torch.testing.assert_close(y, reference(x, routing, layer.bank.weights()).detach(), **near)


def test_without_it_a_layer_does_not_hold():
    """What the test above would see of kernels that are chosen by how many rows there are."""
    chance = torch.Generator().manual_seed(0)
    layer = MoE(64, 32, 8, router=token.TopK(64, 8, generator=chance), std=0.1, generator=chance, backend="reference")
    with torch.no_grad():
        assert outputs(lambda x: layer(x).output, torch.randn(3, 64, generator=chance)) > 1


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [64, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_few_bits(machine, bits, width, dtype):
    chance = torch.Generator().manual_seed(bits)
    group = 32 if width == 64 else 8

    def stack(outs, ins):
        code = torch.randint(-7, 8, (4, outs, ins), generator=chance).to(torch.int8)
        return Packed.of(code, torch.rand(4, outs, ins // group, generator=chance) * 0.05, group=group, bits=bits)

    weights = PackedWeights(stack(2 * width, width), stack(width, width), activation="swiglu")
    router = token.TopK(width, 4, std=width**-0.5, generator=chance)
    victim, one = torch.randn(3, width, generator=chance).to(dtype), weights.up[0]
    with batch_invariant():
        assert outputs(lambda x: packed_experts(x, router(x), weights), victim) == 1
        assert outputs(lambda x: packed_linear(x, one), victim) == 1


# All that decide for tokens by their numbers; those of sequences are told of one sequence at a time.
ROUTERS = [
    "Arrow",
    "DenseToSparse",
    "ExpertChoice",
    "GShard",
    "GroupLimited",
    "Hash",
    "LossFree",
    "NoisyTopK",
    "Switch",
    "TopK",
]


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_holds_or_refuses(name, threads):
    router = getattr(token, name)(24, 6, top_k=1 if name == "Switch" else 2).eval()

    def run(x):
        routing = router(x, token_id_T=torch.zeros(len(x), dtype=torch.long))
        return torch.cat([routing.dense(), routing.dense() if routing.score_TE is None else routing.score_TE], 1)

    victim = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
    with batch_invariant():
        if name == "ExpertChoice":
            with pytest.raises(UsageError, match="choose among all tokens"):
                run(victim)
        else:
            assert outputs(run, victim) == 1


@pytest.mark.parametrize("name", ["TopK", "Switch", "GShard"])
def test_capacity_refuses(name):
    router = getattr(token, name)(8, 4, capacity_factor=1.0).eval()
    with batch_invariant(), pytest.raises(UsageError, match="capacity_factor"):
        router(torch.randn(4, 8))


def test_gradients_and_autocast_refuse():
    router = token.TopK(8, 4)
    with batch_invariant():
        with torch.enable_grad(), pytest.raises(UsageError, match="gradients"):
            router(torch.randn(4, 8))
        with torch.autocast("cpu"), pytest.raises(UsageError, match="autocast"):
            router(torch.randn(4, 8))
    router(torch.randn(4, 8))


CONFIGS = {
    "plain": {},
    "windows": {"window": 7, "sinks": True},
    "wide heads": {"head_dim": 64},
    "latent": {"attention": "mla", "mla": MLAConfig(kv_rank=16, nope_dim=8, rope_dim=8, v_dim=16)},
}


def small(**more):
    moe = MoEConfig(num_experts=4, top_k=2, hidden=32)
    return LM(LMConfig(vocab_size=50, width=32, layers=2, heads=2, max_seq=64, moe=moe, **more)).eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_with_and_without_padding(machine, threads, kind):
    lm, chance = small(**CONFIGS[kind]), torch.Generator().manual_seed(3)
    for parameter in lm.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=chance)
    victim, seen = torch.randint(50, (11,), generator=chance), set()
    with batch_invariant():
        for batch in range(12):
            rows, longer = batch % 5 + 1, int(torch.randint(30, (1,), generator=chance))
            ids = torch.randint(50, (rows, 11 + longer), generator=chance)
            mask, at = torch.ones_like(ids), batch % rows
            mask[at, : longer if batch % 2 else 0] = 0
            mask[at, 11 if not batch % 2 else longer + 11 :] = 0
            ids[at, mask[at].bool()] = victim
            seen.add(lm(ids, attention_mask=mask).logits_BSV[at, mask[at].bool()].numpy().tobytes())
        seen.add(lm(victim[None]).logits_BSV[0].numpy().tobytes())
        plain = lm(victim[None]).logits_BSV[0]
    assert len(seen) == 1
    torch.testing.assert_close(plain, lm(victim[None]).logits_BSV[0].detach(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "function", [torch.sigmoid, torch.nn.functional.silu, torch.nn.functional.softplus, torch.tanh]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_is_the_same_wherever_it_stands(threads, function, dtype):
    """torch has another routine for what is left behind whole vectors: seen of silu and sigmoid on an Intel Xeon."""
    x = (3 * torch.randn(40_000, generator=torch.Generator().manual_seed(1))).to(dtype)
    with batch_invariant():
        y = alike(function, x, "the test")
        for first, last in ((0, 1), (5, 18), (7, 30_000), (33_000, 39_999)):
            assert torch.equal(alike(function, x[first:last], "the test"), y[first:last])
        both = alike(function, x.view(2, -1).t(), "the test")
        assert torch.equal(both, y.view(2, -1).t())
        for count in (100, 128, 256, 1024):  # of every second number, as where gates alternate with values
            assert torch.equal(alike(function, x[1 : 2 * count : 2], "the test"), y[1 : 2 * count : 2])
    assert alike(function, x[:0], "the test").shape == (0,)


@pytest.mark.parametrize(
    "shape", [(64, 48), (36, 100), (7, 3), (17, 5), (1, 3), (1, 2), (17, 2), (5, 3), (0, 4), (4, 0)]
)
def test_tiles_of_all_sizes_agree(threads, shape):
    """Rows in few tiles and in many have the bits that they have alone; tiles that do not agree are not taken."""
    chance = torch.Generator().manual_seed(2)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight_OI, x_MI = (torch.randn(*one, generator=chance).to(dtype) for one in (shape, (353, shape[1])))
        whole_MO = fixed_linear(x_MI, weight_OI)
        for count in (1, 2, 3, 7, 9, 16, 17, 63, 65, 80, 257):
            assert torch.equal(fixed_linear(x_MI[-count:], weight_OI), whole_MO[-count:])
        torch.testing.assert_close(whole_MO, x_MI @ weight_OI.t())


@pytest.mark.parametrize("layout", ["as stored", "transposed", "within another"])
def test_weights_that_are_zero_say_nothing_of_others(monkeypatch, layout):
    """Of a layer that begins with zeros all tiles agree, and of no other of its shape."""
    monkeypatch.setattr(importlib.import_module("turnout.solve.fixed_rows"), "_known", {})
    chance, sizes = torch.Generator().manual_seed(3), (1, 2, 3, 5, 9, 17, 64, 100)
    stored = torch.zeros(64, 64) if layout != "within another" else torch.zeros(64, 67)[:, 3:]
    weight_OI, x_MI = stored.t() if layout == "transposed" else stored, torch.randn(300, 64, generator=chance)
    assert not fixed_linear(x_MI, weight_OI).any()
    assert not any(fixed_linear(x_MI[:size], weight_OI).any() for size in sizes)
    weight_OI.normal_(generator=chance)
    whole_MO = fixed_linear(x_MI, weight_OI)
    assert all(torch.equal(fixed_linear(x_MI[:size], weight_OI), whole_MO[:size]) for size in sizes)


def test_a_tile_that_does_not_agree_is_not_taken(monkeypatch):
    monkeypatch.setattr(importlib.import_module("turnout.solve.fixed_rows"), "_known", {})
    right = torch.mm

    def other_kernel(a_MK, b_KN):
        return right(a_MK, b_KN) + (1e-7 if a_MK.shape[0] in (4, 64) else 0)

    monkeypatch.setattr(torch, "mm", other_kernel)
    weight_OI = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    assert fixed_rows(weight_OI) and not fixed_rows(weight_OI, 4) and not fixed_rows(weight_OI, 64)
    sizes = {size for _, _, size in fixed_tiles(83, lambda size: fixed_rows(weight_OI, size))}
    assert 64 not in sizes and 4 not in sizes
