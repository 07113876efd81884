"""What every router keeps, whichever it is: run over the room's ``__all__``, so a new one is tested when listed."""

import functools
import inspect
import json
import math

import pytest
import torch

from turnout.cli.methods import CATALOGUE
from turnout.decide import token
from turnout.errors import ShapeError, TurnoutError
from turnout.types import Given, Routing

WIDTH = 12


# Options that make another router of one, as a published model has it.
VARIANTS = {
    "TopK with a bias": ("TopK", {"bias": True}),
    "GroupLimited of V2": (
        "GroupLimited",
        {"scores": "softmax", "group_score": "max", "bias": False, "renormalize": False, "num_groups": 2},
    ),
}


# Routers that have so many experts a token and no other number.
FIXED = {"Switch": 1, "GShard": 2, "BASE": 1, "StableMoE": 1, "VQ": 1, "ByKind": 1, "CIGT": 1}


# Sizes of tables that are small enough to look at every number.
SIZES = {"StableMoE": {"vocab_size": 64, "rank": 3}, "HyperRouter": {"hyper_width": 6}, "CIGT": {"hidden": 9}}
SIZES |= {"RMoE": {"hidden": 7}}


def kind_of(name: str) -> type[torch.nn.Module]:
    return getattr(token, VARIANTS.get(name, (name,))[0])


def build(name: str, num_experts: int, **options) -> torch.nn.Module:
    """A router of this name, with as many experts per token as it can have up to 2, and weights that matter."""
    options.setdefault("top_k", FIXED.get(name, min(2, num_experts)))
    options = VARIANTS.get(name, (name, {}))[1] | SIZES.get(name, {}) | options
    if "num_groups" in options and (num_experts % 2 or options["top_k"] > num_experts // 2):
        options["num_groups"] = 1
    router = kind_of(name)(WIDTH, num_experts, **options)
    seeded = torch.Generator().manual_seed(num_experts)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(0, 0.5, generator=seeded)
    return router


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (count,), generator=torch.Generator().manual_seed(seed))


def outputs(num_experts: int, x_TD: torch.Tensor) -> torch.Tensor:
    """What some experts make of tokens: each scales every one of them in its own way."""
    scale_ED = torch.rand(num_experts, WIDTH, generator=torch.Generator().manual_seed(3)).to(x_TD.device, x_TD.dtype)
    return x_TD[:, None] * scale_ED


def known(router: torch.nn.Module, count: int) -> dict[str, object]:
    """What some routers of tokens want to know; here each token is a sequence of its own."""
    if getattr(router, "needs_experts", False):
        return {"experts": functools.partial(outputs, router.num_experts)}
    if getattr(router, "needs_carry", False):
        width = getattr(router, "hidden", router.num_experts)
        return {"carry_TX": torch.randn(1000, width, generator=torch.Generator().manual_seed(7))[:count]}
    if not getattr(router, "needs_given", False):
        return {}
    chance = torch.Generator().manual_seed(7)
    if isinstance(router, token.PatchChoice):  # which of a sequence's tokens
        return {"given": Given.of(1, count)}
    query_BQ = torch.randn(1000, getattr(router, "query_width", 2), generator=chance)[:count]
    task_B = torch.randint(min(router.num_experts, 2), (1000,), generator=chance)[:count]
    return {"given": Given.of(count, count, query_BQ=query_BQ, task_B=task_B, kind_T=task_B, label_B=task_B)}


def call(router: torch.nn.Module, x_TD: torch.Tensor, seed: int = 0) -> Routing:
    chance = torch.Generator().manual_seed(seed)
    return router(x_TD, token_id_T=ids(len(x_TD)), generator=chance, **known(router, len(x_TD)))


def same(a: Routing, b: Routing) -> bool:
    return (
        torch.equal(a.token_R, b.token_R)
        and torch.equal(a.offset_E, b.offset_E)
        and torch.equal(a.weight_R, b.weight_R)
    )


# Routers of sequences have a contract of their own: test_decide_sequence.py.
NAMES = [name for name in (*token.__all__, *VARIANTS) if not hasattr(kind_of(name), "parts")]
every = pytest.mark.parametrize("name", NAMES)
# Routers without a parameter, and those whose parameters are no matrix ``weight``.
FIXED_RULE = {"Hash", "ByKind", "Skills"}
NO_MATRIX = {"HyperRouter", "XMoE", "RMoE", "CIGT"}
learned = pytest.mark.parametrize("name", [name for name in NAMES if name not in FIXED_RULE])
# Routers whose tokens do not all get top_k experts.
VARIES = {"ExpertChoice", "DenseToSparse", "ReMoE", "TopP", "Rectify", "SparseTransport", "Skills", "PatchChoice"}
# Routers that may take more than top_k experts for a token, and one that may take none.
DENSE_AT_FIRST = {"DenseToSparse", "ReMoE", "TopP"}
MAY_BE_NONE = {"ReMoE"}
# Routers whose decision for a token depends on the other tokens, in evaluation too.
LEAKS = {name for name in NAMES if getattr(kind_of(name), "sees_later_tokens", False) is True}
# Routers for which scores that are all alike are no tie, or which share out ties.
NO_TIES = {"HyperRouter", "ReMoE", "Prototyping", "Rectify", "SparseTransport", "PatchChoice"}
# Routers whose weights have, on purpose, another gradient than their values say.
STRAIGHT_THROUGH = {"Rectify"}
dropping = pytest.mark.parametrize(
    "name",
    [
        name
        for name in NAMES
        # Expert choice takes its capacity exactly: see its own tests.
        if "capacity_factor" in inspect.signature(kind_of(name)).parameters and name not in ("ExpertChoice", "Rectify")
    ],
)


@every
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 33, 700])
def test_a_valid_routing_for_any_number_of_tokens(name, count, training):
    router = build(name, 8).train(training)
    routing = call(router, tokens(count)).validate()
    assert (routing.num_tokens, routing.num_experts) == (count, 8)
    assert routing.weight_R.dtype == torch.float32
    assert bool((routing.weight_R >= 0).all())
    for table in (routing.score_TE, routing.logit_TE):
        assert table is None or (table.shape == (count, 8) and table.dtype == torch.float32)
    if count and name not in LEAKS:
        per_token = torch.bincount(routing.token_R, minlength=count)
        most = 8 if name in DENSE_AT_FIRST else router.top_k
        assert int(per_token.max()) <= most and int(per_token.min()) >= (name not in MAY_BE_NONE)
        assert training or name in VARIES or int(per_token.min()) == router.top_k


@every
@pytest.mark.parametrize("num_experts", [2, 3, 5, 17, 64, 300])
def test_a_valid_routing_for_any_number_of_experts(name, num_experts):
    call(build(name, num_experts).eval(), tokens(19)).validate()


@every
def test_all_experts_may_be_chosen(name):
    fixed = FIXED.get(name, 3)
    routing = call(build(name, fixed, top_k=fixed).eval(), tokens(5)).validate()
    assert name in VARIES - LEAKS | {"SparseTransport"} or routing.load_E.tolist() == [5] * fixed


@learned
@pytest.mark.parametrize("count", [3, 700])  # both ways of ordering the scores
@pytest.mark.parametrize("num_experts", [4, 40])
def test_ties_go_to_the_lower_index(name, count, num_experts):
    if name in NO_TIES:
        pytest.skip("equal scores are no tie here")
    router = build(name, num_experts).eval()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
    routing = call(router, tokens(count))
    chosen_TE = routing.dense() != 0
    if name == "ExpertChoice":
        chosen_TE = chosen_TE.t()
    # Every row takes a prefix, never a later one without the one before.
    assert bool((chosen_TE[:, :-1] >= chosen_TE[:, 1:]).all()) and bool(chosen_TE[:, 0].all())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_tokens_are_routed_in_fp32(name, dtype):
    router, x_TD = build(name, 8).eval(), tokens(33).to(dtype)
    assert same(call(router, x_TD), call(router, x_TD.float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(call(router, x_TD), call(router, x_TD.float()))
        assert call(router, x_TD).weight_R.dtype == torch.float32


@every
@pytest.mark.parametrize("training", [True, False])
def test_autocast_changes_nothing(name, training):
    router, x_TD = build(name, 8).train(training), tokens(33)
    plain = call(router, x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = call(router, x_TD)
    assert same(plain, cast)
    assert plain.score_TE is None or torch.equal(plain.score_TE, cast.score_TE)


@every
def test_a_module_cast_to_bf16_still_computes_in_fp32(name):
    router = build(name, 8).eval()
    rounded = build(name, 8).eval()
    rounded.load_state_dict({n: t.to(rounded.state_dict()[n].dtype) for n, t in router.bfloat16().state_dict().items()})
    assert same(call(router, tokens(33)), call(rounded, tokens(33)))


@every
def test_deterministic_under_a_seed(name):
    router, x_TD = build(name, 8).train(), tokens(64)
    assert same(call(router, x_TD, seed=3), call(router, x_TD, seed=3))
    before = torch.get_rng_state()
    call(router, x_TD)
    assert torch.equal(before, torch.get_rng_state()), "a router given a generator must draw from it alone"


@every
def test_evaluation_has_no_noise(name):
    router, x_TD = build(name, 8).eval(), tokens(64)
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    one = router(x_TD, token_id_T=ids(64), generator=generator, **known(router, 64))
    assert torch.equal(before, generator.get_state())
    assert same(one, call(router, x_TD, seed=2))


@every
def test_gradients_reach_every_parameter(name):
    router, x_TD = build(name, 8).train(), tokens(33).requires_grad_()
    routing = call(router, x_TD)
    if not list(router.parameters()):
        assert not routing.weight_R.requires_grad
        return
    pull = torch.randn(routing.num_entries, generator=torch.Generator().manual_seed(9))
    asked = 0 if routing.penalty is None else routing.penalty
    ((routing.weight_R * pull).sum() + asked).backward()
    for label, parameter in router.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, label
    assert x_TD.grad is not None and float(x_TD.grad.abs().sum()) > 0


@learned
def test_gradients_in_fp64(name):
    if name in STRAIGHT_THROUGH:
        pytest.skip("its weights' gradient is not that of their values")
    router = build(name, 5).double().train()
    x_TD = tokens(7).double().requires_grad_()
    weights = list(router.parameters())

    def decide(*inputs):
        routing = call(router, inputs[0])
        return routing.weight_R, routing.score_TE, routing.logit_TE

    assert torch.autograd.gradcheck(decide, (x_TD, *weights), atol=1e-6)


@every
def test_scores_and_logits_carry_gradients(name):
    routing = call(build(name, 8).train(), tokens(33))
    assert (routing.score_TE is None) == (routing.logit_TE is None) == (name in FIXED_RULE)
    if routing.score_TE is not None:
        assert routing.score_TE.requires_grad and routing.logit_TE.requires_grad


@dropping
@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.25])
@pytest.mark.parametrize("seed", range(3))
def test_capacity_is_respected(name, factor, seed):
    count, num_experts = 61, 6
    whole, tight = build(name, num_experts).eval(), build(name, num_experts, capacity_factor=factor).eval()
    x_TD = tokens(count, seed)
    asked, given = call(whole, x_TD), call(tight, x_TD).validate()
    most = max(1, math.ceil(factor * count * whole.top_k / num_experts))
    assert asked.wanted_E is None and int(asked.dropped_E.sum()) == 0
    assert torch.equal(given.wanted_E, asked.load_E), f"seed {seed}"
    assert torch.equal(given.load_E, asked.load_E.clamp(max=most)), f"seed {seed}"


@dropping
def test_capacity_is_at_least_one_token(name):
    routing = call(build(name, 8, capacity_factor=0.01).eval(), tokens(5))
    assert int(routing.load_E.max()) == 1


@every
def test_wrong_sizes_are_refused(name):
    kind = kind_of(name)
    for arguments in ((0, 8), (WIDTH, 0), (-1, 8)):
        with pytest.raises(TurnoutError):
            kind(*arguments)
    for top_k in (0, -1, 9):
        with pytest.raises(TurnoutError, match="top_k"):
            kind(WIDTH, 8, top_k=top_k)


@pytest.mark.parametrize("name", [*dropping.args[1], "ExpertChoice"])
@pytest.mark.parametrize("factor", [0, -1.0, math.nan, math.inf])
def test_a_senseless_capacity_is_refused(name, factor):
    with pytest.raises(TurnoutError, match="capacity_factor"):
        kind_of(name)(WIDTH, 8, capacity_factor=factor)


@every
@pytest.mark.parametrize("shape", [(5, WIDTH + 1), (WIDTH,), (2, 5, WIDTH)])
def test_wrong_tokens_are_refused(name, shape):
    router = build(name, 8)
    with pytest.raises(ShapeError, match=rf"\(T, {WIDTH}\)"):
        router(torch.zeros(shape), token_id_T=ids(shape[0]), **known(router, shape[0]))


@every
def test_the_constructor_is_plain(name):
    parameters = list(inspect.signature(kind_of(name).__init__).parameters.values())[1:]
    assert [p.name for p in parameters[:3]] == ["width", "num_experts", "top_k"]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[2:])
    router = build(name, 8)
    assert (router.width, router.num_experts) == (WIDTH, 8)
    weight = dict(router.named_parameters()).get("weight")
    assert weight is None or weight.shape == (8, WIDTH)


@learned
def test_the_starting_weights_follow_the_generator(name):
    kind = kind_of(name)
    one, two = (kind(WIDTH, 8, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    pairs = list(zip([*one.parameters(), *one.buffers()], [*two.parameters(), *two.buffers()], strict=True))
    assert pairs and all(torch.equal(a, b) for a, b in pairs)
    if name not in NO_MATRIX:
        assert float(one.weight.detach().std()) == pytest.approx(0.02, rel=0.3)


@every
def test_state_goes_through_a_state_dict(name):
    router, other = build(name, 8).eval(), build(name, 8).eval()
    with torch.no_grad():
        for tensor in [*router.parameters(), *router.buffers()]:
            chance = torch.Generator().manual_seed(5)
            tensor.normal_(generator=chance) if tensor.is_floating_point() else tensor.random_(0, 2, generator=chance)
    other.load_state_dict(router.state_dict())
    assert same(call(router, tokens(9)), call(other, tokens(9)))


@every
def test_the_decision_stays_in_its_rows(name):
    """The routing of a token does not depend on its neighbours, unless the router says so (``sees_later_tokens``)."""
    router, x_TD = build(name, 8).eval(), tokens(40)
    alone = call(router, x_TD[:17]).dense()
    together = call(router, x_TD).dense()[:17]
    agree = bool(torch.isclose(alone, together, rtol=1e-5, atol=1e-7).all())
    assert agree == (name not in LEAKS)


@every
def test_a_later_token_changes_no_earlier_routing_in_training_unless_it_is_said(name):
    router, count = build(name, 8).train(), 40
    one, other = tokens(count), tokens(count)
    other[20:] = 3 * tokens(count, seed=1)[20:]
    before, after = (call(router, x_TD).dense()[:20] for x_TD in (one, other))
    agree = bool(torch.isclose(before, after, rtol=1e-5, atol=1e-7).all())
    assert agree == (getattr(router, "sees_later_tokens", False) is False)


@every
def test_what_is_asked_and_carried_has_its_shape(name):
    router = build(name, 8).train()
    for count in (0, 5):
        routing = call(router, tokens(count)).validate()
        assert routing.penalty is None or (routing.penalty.ndim == 0 and routing.penalty.requires_grad) or not count
        assert (routing.carry_TX is not None) == getattr(router, "needs_carry", False)
    assert call(router.eval(), tokens(5)).validate().num_tokens == 5


@every
def test_what_it_takes_is_what_is_said_of_it(name):
    """Each router says what it takes, and ``turnout methods`` shows it: K a token, one, two, or any number."""
    listed = {one["name"]: one.get("traits") for one in json.loads(CATALOGUE.read_text())["methods"]}
    said = listed[kind_of(name).__name__]
    assert said is not None, "its docstring has no `Takes:`"
    router = build(name, 8).eval()
    count_T = (call(router, tokens(64)).dense() > 0).sum(1)
    exact = {
        "K experts a token": router.top_k,
        "K adapters a token": router.top_k,
        "1 expert a token": 1,
        "2 experts a token": 2,
    }
    exact |= {"1 expert of each of K": router.top_k, "K experts an example": router.top_k}
    wanted = [number for start, number in exact.items() if said["pattern"].startswith(start)]
    if wanted and name not in VARIES:
        assert bool((count_T == wanted[0]).all()), (said["pattern"], count_T)
    assert bool(wanted) or name in VARIES | {"FedIns"}, "K a token is said otherwise"
