"""Every executor equals ``reference``, in values and in gradients, on whatever a router may decide."""

import dataclasses
import typing

import pytest
import torch
from torch import Tensor

from turnout.errors import ShapeError, UnknownNameError, UsageError
from turnout.run import EXECUTORS, execute
from turnout.types import ExpertWeights, Routing
from turnout.types.weights import GATED, Activation

ACTIVATIONS = typing.get_args(Activation)
FAST = [name for name in EXECUTORS if name != "reference"]
TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (6e-2, 2e-2), torch.float64: (1e-9, 1e-10)}


def ragged(seed: int, tokens: int, experts: int, density: float) -> Routing:
    """A random pattern: tokens without entries, tokens with many, experts without tokens."""
    g = torch.Generator().manual_seed(seed)
    mask_TE = torch.rand(tokens, experts, generator=g) < density
    mask_TE[:, torch.rand(experts, generator=g) < 0.3] = False
    return Routing.from_dense(torch.rand(tokens, experts, generator=g), mask_TE=mask_TE)


def top(seed: int, tokens: int, experts: int, k: int, skew: float = 0.0) -> Routing:
    g = torch.Generator().manual_seed(seed)
    score_TE = torch.rand(tokens, experts, generator=g) - skew * torch.arange(experts) / experts
    weight_TK, index_TK = score_TE.topk(k)
    return Routing.from_topk(index_TK, weight_TK.abs(), num_experts=experts)


def columns(seed: int, tokens: int, experts: int, each: int) -> Routing:
    """Expert choice: every expert takes the same number of tokens, a token is taken by any number of experts."""
    g = torch.Generator().manual_seed(seed)
    index_EC = torch.rand(experts, tokens, generator=g).argsort(1)[:, :each]
    expert_EC = torch.arange(experts)[:, None].expand(-1, each)
    weight_EC = torch.rand(experts, each, generator=g)
    return Routing.from_entries(
        index_EC.reshape(-1), expert_EC.reshape(-1), weight_EC.reshape(-1), num_tokens=tokens, num_experts=experts
    )


ROUTINGS = {
    "ragged": lambda: ragged(0, 37, 7, 0.3),
    "dense rows": lambda: ragged(1, 9, 5, 0.95),
    "no entries at all": lambda: ragged(2, 11, 3, 0.0),
    "top-2": lambda: top(3, 33, 6, 2),
    "top-1": lambda: top(4, 33, 6, 1),
    "all experts": lambda: top(5, 17, 4, 4),
    "one expert": lambda: top(6, 13, 1, 1),
    "one token": lambda: top(7, 1, 8, 2),
    "two tokens": lambda: top(7, 2, 8, 2),
    "no token": lambda: top(8, 0, 4, 2),
    "skewed": lambda: top(9, 64, 16, 2, skew=2.0),
    "many empty experts": lambda: top(10, 3, 50, 2),
    "expert choice": lambda: columns(11, 29, 6, 7),
    "expert choice, all tokens": lambda: columns(12, 9, 4, 9),
    "truncated": lambda: top(13, 40, 5, 2, skew=1.0).truncate(9),
}


def make(
    routing: Routing,
    *,
    width=12,
    hidden=10,
    dtype=torch.float32,
    activation="swiglu",
    bias=False,
    interleaved=False,
    size=0.5,
    seed=0,
):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * size).to(dtype).requires_grad_()

    E = routing.num_experts
    wide = 2 * hidden if activation in GATED else hidden
    weights = ExpertWeights(
        normal(E, width, wide),
        normal(E, hidden, width),
        normal(E, wide) if bias else None,
        normal(E, width) if bias else None,
        activation,
        interleaved,
    )
    weight_R = routing.weight_R.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    return normal(routing.num_tokens, width), dataclasses.replace(routing, weight_R=weight_R), weights


def leaves(x: Tensor, routing: Routing, weights: ExpertWeights) -> dict[str, Tensor]:
    found = {"x": x, "weight_R": routing.weight_R} | {
        f.name: getattr(weights, f.name) for f in dataclasses.fields(weights) if "_E" in f.name
    }
    return {name: leaf for name, leaf in found.items() if leaf is not None and leaf.requires_grad}


def run(name: str, x: Tensor, routing: Routing, weights: ExpertWeights, *, through=None, autocast=False):
    """The output and every gradient, for an upstream gradient that depends on nothing but the shape."""
    inputs = leaves(x, routing, weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = EXECUTORS[name](x, routing, weights)
    g = torch.Generator().manual_seed(99)
    upstream = torch.randn(y.shape, generator=g, dtype=torch.float64).to(y.dtype)
    loss = through(y) if through else (y * upstream).sum()
    return y, dict(zip(inputs, torch.autograd.grad(loss, inputs.values()), strict=True))


def same(name: str, *case: object, dtype=torch.float32, **options: object) -> None:
    y, grad = run(name, *case, **options)
    expected_y, expected = run("reference", *case, **options)
    relative, absolute = TOLERANCE[dtype]
    assert y.dtype == expected_y.dtype
    for what, a, b in [("y", y, expected_y), *((n, grad[n], expected[n]) for n in expected)]:
        assert a.dtype == b.dtype and a.shape == b.shape, what
        scale = float(b.detach().abs().max()) if b.numel() else 1.0
        torch.testing.assert_close(
            a, b, rtol=relative, atol=absolute * max(scale, 1.0), msg=lambda m, w=what: f"{w}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", FAST)
def test_equals_reference(name, routing, dtype):
    same(name, *make(ROUTINGS[routing](), dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("name", FAST)
def test_activations_and_biases(name, activation, bias):
    for pattern in (ragged(21, 23, 5, 0.4), top(22, 2, 5, 2), ragged(2, 11, 3, 0.0)):
        for interleaved in {False, activation in GATED}:
            same(name, *make(pattern, activation=activation, bias=bias, interleaved=interleaved))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAST)
def test_the_clamps_hold(name, dtype):
    """Numbers so large that every third gate and every second value lies beyond its clamp."""
    for interleaved, hidden in ((False, 10), (True, 10), (False, 400)):
        x, routing, weights = make(
            top(23, 40, 4, 2), activation="swiglu_oai", bias=True, interleaved=interleaved, hidden=hidden, size=2.0,
            dtype=dtype,
        )  # fmt: skip
        h = (x @ weights.up_EDH[0]).detach()
        assert 0.1 < float((h > 7).float().mean()) < 0.4
        same(name, x, routing, weights, dtype=dtype)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "alternating"])
@pytest.mark.parametrize("name", EXECUTORS)
def test_at_the_bounds_of_the_clamps_gradients_flow(name, interleaved):
    """As torch.clamp: 7.0 and -7.0 themselves are inside. Small whole numbers, so that every product is exact."""
    up = torch.tensor([[7.0, 8.0, 1.0, 1.0, 2.0], [2.0, 2.0, 7.0, -7.0, -8.0]])  # gates, values
    up_EDH = (up.t().flatten() if interleaved else up.flatten()).view(1, 1, 10).requires_grad_()
    routing = Routing.from_topk(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), num_experts=1)
    weights = ExpertWeights(up_EDH, torch.ones(1, 5, 1), None, None, "swiglu_oai", interleaved)
    EXECUTORS[name](torch.ones(1, 1), routing, weights).sum().backward()
    grad = up_EDH.grad.view(5, 2).t() if interleaved else up_EDH.grad.view(2, 5)
    assert (grad != 0).tolist() == [[True, False, True, True, True], [True, True, True, True, False]]


@pytest.mark.parametrize("width, hidden", [(1, 1), (7, 3), (8, 16), (33, 17), (100, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAST)
def test_odd_sizes(name, width, hidden, dtype):
    same(name, *make(ragged(23, 19, 4, 0.5), width=width, hidden=hidden, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("tokens", [1, 16, 17, 40, 333])
@pytest.mark.parametrize("name", FAST)
def test_from_few_tokens_to_many(name, tokens):
    same(name, *make(top(24, tokens, 5, 3)))
    same(name, *make(top(25, tokens, 5, 3, skew=3.0), dtype=torch.bfloat16), dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAST)
def test_transposed_weights(name, dtype):
    """Checkpoints store (out, in); the gradient must come back in whatever order the weight has."""
    x, routing, weights = make(ragged(26, 41, 6, 0.4), width=16, hidden=24, dtype=dtype)
    up = weights.up_EDH.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    down = weights.down_EFD.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    same(name, x, routing, dataclasses.replace(weights, up_EDH=up, down_EFD=down), dtype=dtype)
    same(name, x, routing, dataclasses.replace(weights, up_EDH=up[:, :, ::2], activation="relu"), dtype=dtype)


@pytest.mark.parametrize("name", FAST)
def test_non_contiguous_input(name):
    x, routing, weights = make(ragged(27, 23, 4, 0.5))
    same(name, x.detach().t().contiguous().t().requires_grad_(), routing, weights)
    same(name, x.detach()[:1].expand(23, -1).requires_grad_(), routing, weights)
    weight_R = routing.weight_R.detach().repeat_interleave(2)[::2].requires_grad_()
    same(name, x, dataclasses.replace(routing, weight_R=weight_R), weights)


@pytest.mark.parametrize("name", FAST)
def test_expanded_gradient(name):
    same(name, *make(top(28, 23, 4, 2)), through=torch.sum)
    same(name, *make(top(28, 23, 4, 2)), through=lambda y: y.t().contiguous().mean())
    same(name, *make(top(28, 23, 4, 2), dtype=torch.bfloat16), through=torch.sum, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", FAST)
def test_same_layer_twice(name):
    """Two calls share input and weights, and both outputs exist before the backward pass."""
    x, routing, weights = make(top(29, 23, 4, 2))
    other = make(ragged(30, 23, 4, 0.5))[1]

    def twice(executor):
        y = executor(x, routing, weights) + 2 * executor(x, other, weights)
        return torch.autograd.grad(y.square().sum(), [x, weights.up_EDH, routing.weight_R, other.weight_R])

    for a, b in zip(twice(EXECUTORS[name]), twice(EXECUTORS["reference"]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAST)
def test_frozen_parts(name):
    x, routing, weights = make(ragged(31, 23, 4, 0.5), bias=True)
    same(name, x.detach(), routing, weights)
    same(name, x, routing.detach(), weights)
    same(name, x, routing, dataclasses.replace(weights, up_EDH=weights.up_EDH.detach()))
    same(name, x, routing, dataclasses.replace(weights, down_EFD=weights.down_EFD.detach()))
    fields = {f.name: getattr(weights, f.name) for f in dataclasses.fields(weights) if "_E" in f.name}
    same(name, x, routing, ExpertWeights(**{n: w.detach() for n, w in fields.items()}))
    same(name, x.detach(), routing, ExpertWeights(**{n: w.detach() for n, w in fields.items()}))


@pytest.mark.parametrize("tokens", [1, 23])
@pytest.mark.parametrize("name", FAST)
def test_without_gradient(name, tokens):
    x, routing, weights = make(top(32, tokens, 4, 2))
    expected = EXECUTORS["reference"](x, routing, weights)
    with torch.no_grad():
        y = EXECUTORS[name](x, routing, weights)
    assert not y.requires_grad
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(EXECUTORS[name](x, routing, weights), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAST)
def test_autocast(name):
    """Under autocast the products are in its dtype; output and gradients keep the dtypes that were passed."""
    same(name, *make(top(33, 23, 4, 2)), autocast=True, dtype=torch.bfloat16)
    same(name, *make(ragged(33, 23, 4, 0.4), bias=True), autocast=True, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", EXECUTORS)
def test_results_are_not_overwritten_by_later_calls(name):
    x, routing, weights = make(top(34, 40, 4, 2))
    with torch.no_grad():
        first = EXECUTORS[name](x, routing, weights)
        kept = first.clone()
        EXECUTORS[name](x * 3, routing, weights)
    assert torch.equal(first, kept)
    one = run(name, x, routing, weights)[1]
    kept = {n: grad.clone() for n, grad in one.items()}
    run(name, (x * 3).detach().requires_grad_(), routing, weights)
    for n, grad in one.items():
        assert torch.equal(grad, kept[n]), n


@pytest.mark.parametrize("name", EXECUTORS)
def test_poisoned_memory_does_not_leak_in(name):
    """Experts without tokens get a gradient of exactly zero, whatever lay in the memory before."""
    x, routing, weights = make(top(35, 40, 4, 2), width=16, hidden=16)
    for _ in range(3):
        poison = [torch.full_like(weights.up_EDH, torch.nan) for _ in range(4)]
        run(name, x * torch.nan, routing, weights)
        del poison
        none = dataclasses.replace(routing, offset_E=torch.cat([routing.offset_E, routing.offset_E[-1:].expand(3)]))
        more = make(top(36, 40, 7, 2), width=16, hidden=16)[2]
        y, grad = run(name, x, none, more)
        assert torch.isfinite(y).all()
        assert all(torch.isfinite(g).all() for g in grad.values())
        assert not grad["up_EDH"][4:].any() and not grad["down_EFD"][4:].any()


@pytest.mark.parametrize("name", EXECUTORS)
def test_deterministic(name):
    case = make(ragged(37, 40, 6, 0.4))
    (y, grad), (again, grad_again) = run(name, *case), run(name, *case)
    assert torch.equal(y, again)
    assert all(torch.equal(grad[n], grad_again[n]) for n in grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, while it traces
@pytest.mark.parametrize("name", EXECUTORS)
def test_compiles_or_falls_back(name):
    x, routing, weights = make(top(38, 24, 4, 2), width=16, hidden=16)
    torch._dynamo.reset()

    def layer(x):
        return EXECUTORS[name](x * 2, routing, weights) + 1

    expected = layer(x)
    y = torch.compile(layer, backend="eager")(x)
    torch.testing.assert_close(y, expected)
    for a, b in zip(torch.autograd.grad(y.sum(), [x]), torch.autograd.grad(expected.sum(), [x]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_sort(activation, bias):
    for pattern in (ragged(39, 7, 4, 0.5), top(40, 5, 3, 2)):
        x, routing, weights = make(pattern, width=3, hidden=2, dtype=torch.float64, activation=activation, bias=bias)
        inputs = leaves(x, routing, weights)

        def run_sort(*values, names=tuple(inputs), weights=weights, routing=routing):
            given = dict(zip(names, values, strict=True))
            fields = {n: v for n, v in given.items() if n not in ("x", "weight_R")}
            return EXECUTORS["sort"](
                given["x"],
                dataclasses.replace(routing, weight_R=given["weight_R"]),
                dataclasses.replace(weights, **fields),
            )

        assert torch.autograd.gradcheck(run_sort, tuple(inputs.values()))


def test_double_precision_of_sort():
    same("sort", *make(ragged(41, 23, 4, 0.5), dtype=torch.float64), dtype=torch.float64)


def test_user_mistakes():
    x, routing, weights = make(top(42, 6, 4, 2))
    with pytest.raises(UnknownNameError, match="Did you mean 'sort'"):
        execute(x, routing, weights, backend="sorted")
    for name in EXECUTORS:
        with pytest.raises(ShapeError, match="agree in T, D, E and F"):
            execute(x[:5], routing, weights, backend=name)
        with pytest.raises(UsageError, match="autocast"):
            execute(x.double(), routing, weights, backend=name)
    with pytest.raises(UsageError, match="backend='sort'"):
        execute(*make(routing, dtype=torch.float64), backend="grouped")


@pytest.mark.parametrize("backend", EXECUTORS)
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("stored", ["in, out", "out, in"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "change",
    [{"offset_E": [0, 1, 2]}, {"offset_E": [0, 9, 400]}, {"offset_E": [1, 2, None]}, {"token_R": -1}, {"token_R": 400}],
)
def test_a_routing_made_by_hand_reads_no_other_memory(backend, tokens, stored, train, change):
    """Its entries and offsets may be anything."""
    sound = top(0, tokens, 2, 1)
    R = sound.num_entries
    if "offset_E" in change:
        offset_E = torch.tensor([R if bound is None else bound for bound in change["offset_E"]])
        broken = dataclasses.replace(sound, offset_E=offset_E)
    else:
        token_R = sound.token_R.clone()
        token_R[0] = change["token_R"]
        broken = dataclasses.replace(sound, token_R=token_R)
    up, down = torch.randn(2, 16, 32), torch.randn(2, 16, 16)
    if stored == "out, in":
        up, down = (stack.transpose(1, 2).contiguous().transpose(1, 2) for stack in (up, down))
    with pytest.raises((ShapeError, IndexError, RuntimeError)):
        execute(torch.randn(tokens, 16), broken, ExpertWeights(up.requires_grad_(train), down), backend=backend)
