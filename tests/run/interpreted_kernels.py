"""The Triton kernels equal ``reference``, in values and gradients. ``test_kernels.py`` runs this file.

With TRITON_INTERPRET=1 on the CPU, in Triton's interpreter; without it on a CUDA device, compiled.
"""

import dataclasses
import os

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_layer
from turnout.run import execute, reference
from turnout.run.kernels import dispatch, tune
from turnout.run.kernels.executor import _near, kernels
from turnout.types import ExpertWeights, Routing
from turnout.types.weights import GATED

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
ACTIVATIONS = ["swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai", "gelu", "gelu_tanh", "relu", "silu"]


def chance(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loads(counts: list[int], *, tokens: int, seed: int = 0) -> Routing:
    """Expert e takes counts[e] random tokens."""
    g = chance(seed)
    token_R = torch.cat([torch.randperm(tokens, generator=g)[:count] for count in counts])
    expert_R = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return Routing.from_entries(
        token_R, expert_R, torch.rand(len(token_R), generator=g), num_tokens=tokens, num_experts=len(counts)
    )


def top(seed: int, tokens: int, experts: int, k: int, skew: float = 0.0) -> Routing:
    score_TE = torch.rand(tokens, experts, generator=chance(seed)) - skew * torch.arange(experts) / experts
    weight_TK, index_TK = score_TE.topk(k)
    return Routing.from_topk(index_TK, weight_TK.abs(), num_experts=experts)


def ragged(seed: int, tokens: int, experts: int, density: float) -> Routing:
    """Tokens without entries, tokens with many, experts without tokens."""
    g = chance(seed)
    mask_TE = torch.rand(tokens, experts, generator=g) < density
    mask_TE[:, torch.rand(experts, generator=g) < 0.3] = False
    return Routing.from_dense(torch.rand(tokens, experts, generator=g), mask_TE=mask_TE)


def move(routing: Routing) -> Routing:
    names = ("token_R", "weight_R", "offset_E", "entry_R")
    return dataclasses.replace(routing, **{n: t.to(DEVICE) for n in names if (t := getattr(routing, n)) is not None})


def make(
    routing: Routing, *, width=24, hidden=20, dtype=torch.float32, activation="swiglu", bias=False, size=0.5, seed=0
):
    g, experts = chance(seed), routing.num_experts
    wide = hidden * (2 if activation in GATED else 1)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g) * size).to(DEVICE, dtype).requires_grad_()

    weights = ExpertWeights(
        normal(experts, width, wide),
        normal(experts, hidden, width),
        normal(experts, wide) if bias else None,
        normal(experts, width) if bias else None,
        activation,
    )
    routing = move(routing)
    routing = dataclasses.replace(routing, weight_R=routing.weight_R.detach().float().requires_grad_())
    return normal(routing.num_tokens, width), routing, weights


def leaves(x: Tensor, routing: Routing, weights: ExpertWeights) -> dict[str, Tensor]:
    stacks = {f.name: getattr(weights, f.name) for f in dataclasses.fields(weights) if "_E" in f.name}
    found = {"x": x, "weight_R": routing.weight_R} | stacks
    return {name: leaf for name, leaf in found.items() if leaf is not None and leaf.requires_grad}


def run(executor, x: Tensor, routing: Routing, weights: ExpertWeights, *, upstream=None) -> dict[str, Tensor]:
    """The output and every gradient, for an upstream gradient that is exact in the dtype ``upstream``."""
    inputs = leaves(x, routing, weights)
    y = executor(x, routing, weights)
    slope = torch.randn(y.shape, generator=chance(99)).to(upstream or y.dtype).to(y)
    return {"y": y.detach()} | dict(zip(inputs, torch.autograd.grad(y, inputs.values(), slope), strict=True))


def exactly(x: Tensor, routing: Routing, weights: ExpertWeights) -> dict[str, Tensor]:
    """What ``reference`` gives in fp32 for the same numbers: roundings of 16 bits on its way would be in the way."""
    inputs = leaves(x, routing, weights)

    def wide(leaf: Tensor | None) -> Tensor | None:
        return None if leaf is None else leaf.detach().float().requires_grad_(leaf.requires_grad)

    stacks = {f.name: wide(getattr(weights, f.name)) for f in dataclasses.fields(weights) if "_E" in f.name}
    found = run(
        reference,
        wide(x),
        dataclasses.replace(routing, weight_R=wide(routing.weight_R)),
        dataclasses.replace(weights, **stacks),
        upstream=x.dtype,
    )
    return {name: one.to(inputs.get(name, x).dtype) for name, one in found.items()}


def same(x: Tensor, routing: Routing, weights: ExpertWeights) -> None:
    got, wanted = run(kernels, x, routing, weights), exactly(x, routing, weights)
    tolerance = TOLERANCE[x.dtype]
    for name, one in wanted.items():
        assert got[name].dtype == one.dtype and got[name].shape == one.shape, name
        scale = max(float(one.abs().max()), 1.0) if one.numel() else 1.0
        torch.testing.assert_close(
            got[name], one, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}\n{routing}"
        )


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Every buffer starts as NaN, or as the largest number: what a kernel leaves unwritten, or reads too far, shows."""

    def poisoned(make):
        def fill(*args, **options):
            made = make(*args, **options)
            return made.fill_(torch.nan if made.dtype.is_floating_point else 2**30)

        return fill

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))


ROUTINGS = {
    "ragged": lambda: ragged(0, 37, 7, 0.3),
    "no entries at all": lambda: ragged(2, 11, 3, 0.0),
    "top-2": lambda: top(3, 33, 6, 2),
    "top-3, one expert in all": lambda: top(4, 19, 3, 3, skew=1.0),
    "one token": lambda: top(7, 1, 8, 2),
    "one token, one expert": lambda: top(7, 1, 1, 1),
    "no token": lambda: top(8, 0, 4, 2),
    "skewed": lambda: top(9, 64, 16, 2, skew=2.0),
    "truncated": lambda: top(13, 40, 5, 2, skew=1.0).truncate(9),
    "edges of tiles": lambda: loads([0, 15, 16, 17, 0, 1, 32, 33, 0], tokens=40, seed=14),
}


@pytest.mark.parametrize("routing", ROUTINGS)
def test_equals_reference(routing):
    same(*make(ROUTINGS[routing]()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("routing", ["ragged", "top-2", "no entries at all", "edges of tiles"])
def test_equals_reference_in_16_bits(routing, dtype):
    same(*make(ROUTINGS[routing](), dtype=dtype))


@pytest.mark.parametrize("seed", range(4))
def test_random_cases(seed):
    """What no list foresees; the seed says which case failed."""
    g = chance(1000 + seed)
    tokens, experts, width, hidden = (int(torch.randint(1, n, (), generator=g)) for n in (60, 12, 70, 50))
    density, activation = float(torch.rand((), generator=g)), ACTIVATIONS[seed % len(ACTIVATIONS)]
    same(*make(ragged(seed, tokens, experts, density), width=width, hidden=hidden, activation=activation, bias=True))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_biases(activation, bias):
    same(*make(ragged(21, 23, 5, 0.4), activation=activation, bias=bias))
    x, routing, weights = make(top(22, 9, 4, 2), activation=activation, bias=bias, dtype=torch.bfloat16)
    same(x, routing, weights)
    same(x, routing, dataclasses.replace(weights, interleaved=True))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "alternating"])
def test_the_clamps_hold(interleaved):
    """Numbers so large that gates and values lie beyond their clamps, and some exactly at them."""
    x, routing, weights = make(top(23, 30, 4, 2), activation="swiglu_oai", bias=True, size=1.2)
    same(x, routing, dataclasses.replace(weights, interleaved=interleaved))
    with torch.no_grad():
        weights.up_EDH.zero_()
        weights.up_bias_EH.copy_(torch.arange(weights.up_bias_EH.numel()).view_as(weights.up_bias_EH) % 17 - 8)
    same(x, routing, dataclasses.replace(weights, interleaved=interleaved))


@pytest.mark.parametrize("width, hidden", [(1, 1), (7, 3), (33, 17), (16, 32), (64, 48), (90, 20)])
def test_odd_sizes(width, hidden):
    same(*make(ragged(23, 21, 4, 0.4), width=width, hidden=hidden))
    same(*make(top(24, 21, 4, 2), width=width, hidden=hidden, dtype=torch.bfloat16, bias=True))


@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_heights_of_tiles(block_m, monkeypatch):
    monkeypatch.setattr(tune, "tile_rows", lambda rows, experts: block_m)
    same(*make(loads([150, 0, 1, block_m, block_m + 1], tokens=150, seed=25), activation="geglu"))


def test_many_experts_and_many_of_them_a_token():
    x, routing, weights = make(top(26, 2, 512, 16), width=4, hidden=2, activation="silu")
    same(x, routing, dataclasses.replace(weights, **_detached(weights)))  # 1024 matrices take the interpreter long
    same(*make(top(26, 2, 90, 16), width=4, hidden=2, activation="silu"))


def test_tables_of_tiles():
    for seed, block_m in enumerate((16, 32, 16)):
        routing = move(ragged(seed, 90, 9, 0.5))
        table, height = dispatch.tiles(routing.offset_E, routing.num_entries, block_m)
        bounds = routing.offset_E.tolist()
        wanted = [(e, r) for e in range(9) for r in range(bounds[e], bounds[e + 1], block_m)]
        assert height == block_m and table.shape[1] >= len(wanted) and table.shape[1] % 16 == 0
        assert list(zip(*table[:, : len(wanted)].tolist(), strict=True)) == wanted, seed
        assert table[0, len(wanted) :].tolist() == [-1] * (table.shape[1] - len(wanted))


def test_weights_of_any_strides():
    """Checkpoints store (out, in); the gradient comes back in the order that the weight has."""
    x, routing, weights = make(ragged(27, 23, 4, 0.5), width=16)
    for order in [(0, 2, 1), (2, 0, 1), (1, 2, 0)]:
        back = tuple(order.index(axis) for axis in range(3))
        up, down = (
            w.detach().permute(order).contiguous().permute(back).requires_grad_()
            for w in (weights.up_EDH, weights.down_EFD)
        )
        case = x, routing, dataclasses.replace(weights, up_EDH=up, down_EFD=down)
        same(*case)
        got = run(kernels, *case)
        assert got["up_EDH"].stride() == up.stride() and got["down_EFD"].stride() == down.stride()
    same(x, routing, dataclasses.replace(weights, up_EDH=weights.up_EDH[:, :, ::2], activation="relu"))
    same(x, routing, dataclasses.replace(weights, up_EDH=weights.up_EDH[:1].expand(4, -1, -1)))


def test_only_what_32_bits_cannot_address_is_copied():
    large = torch.empty_strided((512, 4096, 2048), (1, 512 * 2048, 512), device="meta")
    assert _near(large).is_contiguous()
    plain = torch.empty(512, 4096, 2048, device="meta")
    for ours in (plain, plain.transpose(1, 2), plain[:, :, ::2], plain[:1].expand(64, -1, -1)):
        assert _near(ours) is ours


def test_inputs_of_any_strides():
    x, routing, weights = make(ragged(28, 23, 4, 0.5))
    same(x.detach().t().contiguous().t().requires_grad_(), routing, weights)
    same(x.detach()[:1].expand(23, -1).requires_grad_(), routing, weights)
    same(x.detach().repeat(1, 2)[:, : x.shape[1]].requires_grad_(), routing, weights)
    weight_R = routing.weight_R.detach().repeat_interleave(2)[::2].requires_grad_()
    same(x, dataclasses.replace(routing, weight_R=weight_R), weights)
    torch.testing.assert_close(execute(x, routing, weights, backend="kernels"), kernels(x, routing, weights))
    for through in (torch.sum, lambda y: y.t().contiguous().mean()):  # an expanded and a transposed slope
        got, wanted = (torch.autograd.grad(through(f(x, routing, weights)), x)[0] for f in (kernels, reference))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_frozen_parts():
    x, routing, weights = make(ragged(29, 23, 4, 0.5), bias=True)
    stacks = {f.name: getattr(weights, f.name) for f in dataclasses.fields(weights) if "_E" in f.name}
    frozen = {name: stack.detach() for name, stack in stacks.items()}
    same(x.detach(), routing, weights)
    same(x, routing.detach(), weights)
    same(x, routing, ExpertWeights(**frozen))
    same(x.detach(), routing, ExpertWeights(**frozen))
    for name, stack in stacks.items():
        same(x.detach(), routing.detach(), ExpertWeights(**{**frozen, name: stack}))


@pytest.mark.parametrize("bias", [False, True])
def test_second_derivatives(bias):
    found = []
    for f in (kernels, reference):
        x, routing, weights = make(ragged(33, 11, 3, 0.5), width=8, hidden=8, bias=bias, activation="gelu")
        given = [x, *leaves(x, routing, weights).values()]
        first = torch.autograd.grad(f(x, routing, weights).square().sum(), given, create_graph=True)
        found.append(torch.autograd.grad(sum(slope.square().sum() for slope in first), given))
    for got, wanted in zip(*found, strict=True):
        assert float(wanted.abs().max()) > 0
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_what_is_kept_for_the_backward_pass():
    """Of floating point that is not an argument: the up product alone; nothing at all without a gradient."""
    x, routing, weights = make(top(30, 32, 4, 2), width=16, hidden=24)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = kernels(x, routing, weights)
    given = {t.data_ptr() for t in (x, *leaves(x, routing, weights).values())}
    assert [tuple(t.shape) for t in kept if t.is_floating_point() and t.data_ptr() not in given] == [(64, 48)]
    with torch.no_grad():
        silent = kernels(x, routing, weights)
    assert not silent.requires_grad and torch.equal(silent, y)
    assert torch.equal(kernels(x.detach(), routing.detach(), dataclasses.replace(weights, **_detached(weights))), y)


def _detached(weights: ExpertWeights) -> dict[str, Tensor]:
    return {name: getattr(weights, name).detach() for name in ("up_EDH", "down_EFD")}


def test_the_same_on_every_run():
    case = make(ragged(31, 40, 6, 0.5))
    one, two = run(kernels, *case), run(kernels, *case)
    assert all(torch.equal(one[name], two[name]) for name in one)
    x, routing, weights = case
    y = kernels(x, routing, weights).sum()
    (first,) = torch.autograd.grad(y, [weights.up_EDH], retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(y, [weights.up_EDH])[0])


def test_autocast():
    """Products in the dtype of autocast; output and gradients in those that were passed."""
    x, routing, weights = make(ragged(32, 23, 4, 0.4), bias=True)

    def automatic(executor):
        def cast(*case):
            with torch.autocast(DEVICE, torch.bfloat16):
                return executor(*case)

        return cast

    got, wanted = run(automatic(kernels), x, routing, weights), run(automatic(reference), x, routing, weights)
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype == torch.float32
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(got[name], wanted[name], rtol=4e-2, atol=4e-2 * scale, msg=name)


def test_a_nan_stays_with_its_token():
    """Rows past an expert's end read somebody else's values; they must not reach anything that is written."""
    for activation in ("swiglu", "relu"):
        x, routing, weights = make(loads([5, 20, 0, 3], tokens=21, seed=33), activation=activation)
        bad = x.detach().clone()
        bad[0] = torch.nan
        y, wanted = kernels(bad, routing, weights), reference(bad, routing, weights)
        assert wanted.isnan().any() and torch.equal(y.isnan(), wanted.isnan())
        torch.testing.assert_close(y[1:], reference(x, routing, weights)[1:], rtol=1e-4, atol=1e-4)


def test_the_benchmark_times_nothing_that_is_wrong(monkeypatch):
    case = gpu_layer.Case(24, 16, 4, 2, 8, "fp32", 1.5)
    given, decision = gpu_layer.tensors(case, DEVICE), gpu_layer.decide(case, DEVICE, 0)
    assert gpu_layer.check(case, given, decision) == {}
    monkeypatch.setitem(gpu_layer.CONTESTANTS, "twice", lambda *case: 2 * reference(*case))
    monkeypatch.setitem(gpu_layer.CONTESTANTS, "nan", lambda *case: torch.nan * reference(*case))
    assert set(gpu_layer.check(case, given, decision)) == {"twice", "nan"}
