"""A model spread over processes: what is refused, steps of an optimizer, whole tensors."""

import importlib
from typing import Any

import pytest
import torch
from processes import spawn

from turnout.errors import UsageError
from turnout.models import LM, LMConfig, MoEConfig
from turnout.run.ranks.processes import Ranks
from turnout.run.ranks.shard import Meshes, mesh, shard
from turnout.run.ranks.whole import clip, gradient_norm, settle, whole
from turnout.types.layout import Layout
from turnout.types.placement import Placement
from turnout.types.plan import Plan

# The room has a function of this name.
sharding = importlib.import_module("turnout.run.ranks.shard")
SIZES: dict[str, Any] = {"vocab_size": 31, "width": 16, "layers": 2, "heads": 2, "max_seq": 32, "init_std": 0.2}
MOE = MoEConfig(num_experts=4, top_k=2, hidden=8, bias=True)
COPIES = Placement(2, (4, 4), ((0, 3, 1, 3, 2, 1), (0, 1, 2, 3, 0, 1)), ((0, 0, 0, 1, 1, 1), (0, 0, 0, 1, 1, 1)))


def _lm(moe: MoEConfig | None = MOE) -> LM:
    return LM(LMConfig(**SIZES, moe=moe), seed=1)


def _meshes(layout: Layout) -> Meshes:
    nothing: Any = None
    return Meshes(layout, nothing, nothing, nothing)


def _steps(model: Any, layout: Layout, meshes: Meshes | None, optimizer: Any, count: int) -> list[float]:
    """So many steps on batches of four rows, clipped; the norms of the gradients."""
    norms, parts, part = [], 1 if meshes is None else layout.data_ranks, 0 if meshes is None else meshes.data_rank
    for step in range(count):
        id_BS = torch.randint(31, (4, 9), generator=torch.Generator().manual_seed(step))
        own_BS = id_BS.chunk(parts)[part]
        optimizer.zero_grad()
        (model.loss(own_BS[:, :-1], own_BS[:, 1:]).nats / 32).backward()
        if meshes is None:
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        else:
            norm = gradient_norm(model, meshes)
            clip(model, norm, 0.5)
            norms.append(float(norm))
        optimizer.step()
        with torch.no_grad():  # which leaves the outermost parameters gathered
            model(own_BS[:, :-1])
    return norms


def trained(ranks: Ranks, plans: list[Plan]) -> list[str]:
    """What is wrong after some steps of AdamW, in weights and states of the optimizer, with their names and shapes."""
    wrong = []
    for plan in plans:
        one, model, meshes = _lm(), _lm(), mesh(plan.layout)
        shard(model, plan.layout, meshes, plan=plan)
        first, other = (torch.optim.AdamW(each.parameters(), lr=1e-2, eps=1e-3) for each in (one, model))
        want, got = _steps(one, plan.layout, None, first, 4), _steps(model, plan.layout, meshes, other, 4)
        if not torch.allclose(torch.tensor(want), torch.tensor(got), rtol=1e-5):
            wrong.append(f"{plan.layout}: norms {got}, not {want}")
        settle(model)
        weights = dict(model.named_parameters())
        moments = {name: other.state[weight]["exp_avg"] for name, weight in weights.items()}
        old = {name: first.state[weight]["exp_avg"] for name, weight in one.named_parameters()}
        for tensors, known in ((weights, dict(one.named_parameters())), (moments, old)):
            seen = dict(whole(model, tensors))
            for name, tensor in known.items():
                if seen[name].shape != tensor.shape or not torch.allclose(seen[name], tensor, atol=2e-5):
                    wrong.append(f"{plan.layout}: {name} {seen[name].shape}")
        for _, module in sharding.experts_in(model):
            wrong += [f"copies of {part} part" for part in _parted(module)]
    return wrong


def _parted(module: Any) -> list[str]:
    """The parameters of which two copies of an expert differ."""
    if module.owners is None:
        return []
    full = {part: parameter.full_tensor() for part, parameter in module.named_parameters()}
    slots = module.owners.expert_S.tolist()
    first = [slots.index(expert) for expert in slots]
    return [part for part, tensor in full.items() if not torch.equal(tensor, tensor[first])]


@pytest.mark.slow
def test_steps_and_norms_are_those_of_one_process() -> None:
    """AdamW with clipping, over layouts, also with experts in several copies, which stay the same to the bit."""
    two = [Plan(Layout(dp_shard=2, ep=2)), Plan(Layout(dp_shard=2, ep=2), placement=COPIES), Plan(Layout(dp_shard=2))]
    assert spawn(2, trained, two) == [[], []]
    four = [
        Plan(Layout(dp_shard=4, ep=2), placement=COPIES),
        Plan(Layout(dp_replicate=2, dp_shard=2, ep=2)),
        Plan(Layout(dp_shard=4, ep=2, zero=0)),
    ]
    assert spawn(4, trained, four) == [[], [], [], []]


def worded(ranks: Ranks) -> list[str]:
    """What is said of layouts, experts and placements that do not fit two processes."""
    spread, said = Layout(dp_shard=2, ep=2), []
    odd = MoEConfig(num_experts=3, top_k=1, hidden=8)
    uneven = Placement(2, (4, 4), ((0, 1, 2, 3),) * 2, ((0, 0, 0, 1),) * 2)
    named = Placement(2, (4,), ((0, 1, 2, 3),), ((0, 0, 1, 1),), layers=("blocks.0.ff",))
    tries = [
        lambda: mesh(Layout(dp_shard=4)),
        lambda: mesh(Layout(tp=2)),
        lambda: shard(_lm(odd), spread, mesh(spread)),
        lambda: shard(_lm(), spread, mesh(spread), plan=Plan(spread, placement=uneven)),
        lambda: shard(_lm(), spread, mesh(spread), plan=Plan(spread, placement=named)),
    ]
    for each in tries:
        try:
            each()
            said.append("nothing")
        except UsageError as error:
            said.append(str(error))
    return said


@pytest.mark.slow
def test_what_does_not_fit_the_processes_is_named() -> None:
    """With the nearest that does."""
    for world, axes, experts, uneven, named in spawn(2, worded):
        assert "be the 4 of the layout" in world
        assert "use dp_shard=2" in axes
        assert "blocks.0.ff.bank must be a multiple of ep=2" in experts
        assert "got 3. Nearest fix: pass ep=1, or 4 experts" in experts
        assert "[3, 1] experts" in uneven
        assert "blocks.1.ff.bank" in named


@pytest.mark.parametrize(
    ("model", "how", "said"),
    [
        (torch.nn.Linear(2, 2), {}, "without blocks"),
        (_lm(), {"plan": Plan(Layout(dp_shard=4))}, "be of the layout"),
        (_lm(), {"plan": Plan(Layout(dp_shard=2), gather="int8")}, "have collectives"),
        (_lm(MoEConfig(num_experts=4, top_k=1, hidden=8, router="ExpertChoice")), {}, "blocks.0.ff.router"),
        (
            _lm(MoEConfig(num_experts=4, top_k=1, hidden=8, router="Switch", router_options={"capacity_factor": 1.0})),
            {},
            "chooses among the tokens",
        ),
    ],
    ids=["no blocks", "other layout", "int8", "expert choice", "capacity"],
)
def test_what_would_not_be_exact_is_refused(model: torch.nn.Module, how: dict[str, Any], said: str) -> None:
    """Before anything is changed."""
    layout = Layout(dp_shard=2)
    with pytest.raises(UsageError, match=said):
        shard(model, layout, _meshes(layout), **how)


def test_processes_have_to_be_started() -> None:
    """A mesh without them says how."""
    with pytest.raises(UsageError, match="no process group"):
        mesh(Layout())


def test_alone_nothing_is_spread() -> None:
    """One process keeps its model as it is."""
    lm = shard(_lm(), Layout(), _meshes(Layout()))
    assert [name for name, _ in whole(lm, dict(lm.named_parameters()))] == [
        name for name, _ in _lm().named_parameters()
    ]
    for name, tensor in whole(lm, dict(lm.named_parameters())):
        assert torch.equal(tensor, dict(_lm().named_parameters())[name]), name


def stock(ranks: Ranks) -> list[str]:
    """What is wrong after some steps where torch's own ``fully_shard`` holds a model, without anything of ours."""
    from torch.distributed.fsdp import fully_shard

    one, model = _lm(), _lm()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    steps = [torch.optim.AdamW(each.parameters(), lr=0.05, fused=True) for each in (one, model)]
    for step in range(3):
        id_BS = torch.randint(31, (4, 8), generator=torch.Generator().manual_seed(step))
        for each, rows, optimizer in ((one, id_BS, steps[0]), (model, id_BS.chunk(2)[ranks.rank], steps[1])):
            optimizer.zero_grad()
            each(rows).logits_BSV.square().mean().backward()
            optimizer.step()
    wanted = dict(one.named_parameters())
    return [
        f"{name}: {error:.1e}"
        for name, parameter in model.named_parameters()
        if not (error := float((parameter.full_tensor().detach() - wanted[name].detach()).abs().max())) < 1e-5
    ]


@pytest.mark.slow
def test_torch_shards_a_model_as_any_other() -> None:
    """FSDP2 refuses parameters whose memory is not in the order of their shape."""
    assert spawn(2, stock) == [[], []]
