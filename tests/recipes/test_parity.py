"""Every supported layout has the gradients of one process, and a comparison that planted faults do not get past."""

import dataclasses
import json
from typing import Any

import pytest
from processes import spawn

from turnout.errors import UnknownNameError, UsageError
from turnout.models import LM, FactoredConfig, LMConfig, MoEConfig
from turnout.recipes.parity import _ROUNDED, Gap, Parity, compare, plan_of, small_model
from turnout.recipes.planted import FAULTS, Fault
from turnout.run.ranks.processes import Ranks
from turnout.types.layout import Layout
from turnout.types.placement import Placement
from turnout.types.plan import Plan

SPREAD = Layout(dp_shard=2, ep=2)
PIPED = Plan(Layout(pp=2, dp_shard=2, ep=2), microbatches=2, schedule="ZB-H1")
COPIES = Placement(2, (4, 4), ((0, 3, 1, 3, 2, 1), (0, 1, 2, 3, 0, 1)), ((0, 0, 0, 1, 1, 1), (0, 0, 0, 1, 1, 1)))
PLANS = {
    2: [
        Plan(Layout(pp=2), microbatches=3),
        Plan(Layout(pp=2), microbatches=4, schedule="Interleaved1F1B", stages=(1, 0, 2, 1)),
        Plan(Layout(dp_replicate=2)),
        Plan(Layout(dp_shard=2, zero=0), microbatches=2),
        Plan(Layout(dp_shard=2, zero=1), microbatches=2),
        Plan(Layout(dp_shard=2, zero=2), microbatches=2),
        Plan(Layout(dp_shard=2, zero=3), microbatches=2),
        Plan(SPREAD),
        Plan(Layout(dp_shard=2, ep=2, zero=0), microbatches=2),
        Plan(SPREAD, recompute=True),
        Plan(Layout(pp=2), microbatches=4),
        Plan(Layout(pp=2), microbatches=4, schedule="ZB-H1", stages=(2, 1)),
        Plan(Layout(pp=2), microbatches=4, schedule="DualPipeV"),
        Plan(SPREAD, placement=COPIES),
    ],
    4: [
        Plan(Layout(pp=4), microbatches=5, schedule="ZB-H2"),
        PIPED,
        Plan(Layout(pp=2, dp_shard=2, zero=1), microbatches=2, schedule="ZBVZeroBubble"),
        Plan(Layout(dp_shard=4)),
        Plan(Layout(dp_shard=4), secondary=2),
        Plan(Layout(dp_shard=4, ep=2)),
        Plan(Layout(dp_shard=4, ep=4)),
        Plan(Layout(dp_shard=4, ep=2, zero=0)),
        Plan(Layout(dp_shard=4, ep=2, zero=1), microbatches=2),
        Plan(Layout(dp_shard=4, ep=2, zero=2), microbatches=2),
        Plan(Layout(dp_replicate=2, dp_shard=2)),
        Plan(Layout(dp_replicate=2, dp_shard=2, ep=2)),
        Plan(Layout(dp_replicate=2, dp_shard=2, ep=2, zero=0)),
        Plan(Layout(pp=2, dp_shard=2, ep=2), microbatches=2),
        Plan(Layout(pp=2, dp_replicate=2, zero=0), microbatches=4, schedule="ZBVZeroBubble"),
        Plan(Layout(pp=4), microbatches=4, schedule="GPipe"),
        Plan(Layout(dp_shard=4, ep=2), placement=COPIES),
    ],
}
SIZES: dict[str, Any] = {"vocab_size": 31, "width": 16, "layers": 2, "heads": 2, "max_seq": 32, "init_std": 0.2}
MODELS: dict[str, LMConfig] = {
    "dense": LMConfig(**SIZES),
    # Neither experts nor their sizes come out even: two a process, over two more; a hidden size of 5.
    "odd": LMConfig(
        **{**SIZES, "vocab_size": 29},
        moe=MoEConfig(num_experts=6, top_k=2, hidden=5, activation="relu", bias=True),
    ),
    "one": LMConfig(**SIZES, moe=MoEConfig(num_experts=2, top_k=1, hidden=5, activation="gelu", bias=True)),
    "factored": LMConfig(
        **SIZES,
        moe=MoEConfig(num_experts=8, top_k=2, hidden=8, factored=FactoredConfig(up_rank=3, down_rank=2, share=2)),
    ),
    "shared": LMConfig(
        **SIZES, moe=MoEConfig(num_experts=4, top_k=2, hidden=8, distinct=(2, 4), shared_hidden=8, shared_gate=True)
    ),
    "pre-gate": LMConfig(**SIZES, moe=MoEConfig(num_experts=4, top_k=2, hidden=8, router="PreGate")),
}


def together(ranks: Ranks, cases: list[tuple[Plan, dict[str, Any]]]) -> list[Parity]:
    """All of them, one after the other; a model is given by its configuration."""
    found = []
    for plan, how in cases:
        lm = {"lm": LM(how["lm"], seed=1)} if "lm" in how else {}
        found.append(compare(plan, **{**how, **lm}))
    return found


def _holding(found: list[Parity]) -> None:
    assert found
    assert all(each.holds for each in found), "\n\n".join(str(each) for each in found if not each.holds)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_has_the_gradients_of_one_process(world: int) -> None:
    """ZeRO 0 to 3, hybrid, experts spread, micro-batches, recomputation, placements with copies; to 1e-12 in fp64."""
    cases = [(plan, {"dtype": "fp64"}) for plan in PLANS[world]]
    cases += [(plan, {}) for plan in PLANS[world][-4:]]
    _holding(spawn(world, together, cases)[0])


@pytest.mark.slow
def test_a_pipeline_with_a_fault_does_not_pass() -> None:
    """In every stage, with experts spread."""
    found = spawn(4, together, [(PIPED, {"plant": fault, "dtype": "fp64"}) for fault in FAULTS])[0]
    assert [each.fault for each in found if each.holds] == []


@pytest.mark.slow
def test_every_kind_of_model_has_the_gradients_of_one_process() -> None:
    """Dense, sizes that nothing divides, factors, experts that share their weights, a router of all layers."""
    cases = [(Plan(Layout(dp_shard=4, ep=2)), {"lm": config, "dtype": "fp64"}) for config in MODELS.values()]
    _holding(spawn(4, together, cases)[0])


@pytest.mark.slow
def test_two_processes_each_fault_and_each_rounding() -> None:
    """Each planted fault fails, a factor with its number; bf16 is within its own bound, fp32 within its own."""
    plan = Plan(SPREAD)
    cases: list[Any] = [(plan, {"plant": name}) for name in FAULTS]
    coarse = [dataclasses.replace(plan, gather="bf16"), dataclasses.replace(plan, gather="bf16", reduce="bf16")]
    cases += [(each, {}) for each in coarse] + [(plan, {"seed": seed}) for seed in range(6)]
    found = spawn(2, together, cases)[0]
    faults, rest = dict(zip(FAULTS, found, strict=False)), found[len(FAULTS) :]
    assert [name for name, each in faults.items() if each.holds] == []
    # What is off by less is rounding, another on each processor, and no fault.
    wrong = {
        name: [gap for gap in faults[name].failed if gap.what == "gradient" and not gap.error < _ROUNDED]
        for name in FAULTS
    }
    experts = {gap.name: round(gap.ratio, 3) for gap in wrong["factor"]}
    assert set(experts.values()) == {2.0}, experts
    assert all(".bank." in name for name in experts)
    assert {round(gap.ratio, 3) for gap in wrong["average"]} == {0.5}
    assert [gap.note for gap in wrong["lose"]] == ["missing"]
    assert wrong["skip"] and all("blocks.0" in gap.name for gap in wrong["skip"])
    _holding(rest)
    assert all(each.gaps[0].error > 1e-4 for each in rest[:2]), "bf16 did not travel in bf16"


def test_a_comparison_of_nothing_does_not_hold() -> None:
    """Nor one whose numbers are none."""
    plan = Plan()
    assert not Parity(plan, "fp32", 1e-6, ()).holds
    assert "nothing was compared" in str(Parity(plan, "fp32", 1e-6, ()))
    assert not Parity(plan, "fp32", 1e-6, (Gap("gradient", "a", float("nan")),)).holds
    assert not Parity(plan, "fp32", 1e-6, (Gap("gradient", "a", 0.0, note="missing"),)).holds
    good = Parity(plan, "fp32", 1e-6, (Gap("gradient", "a", 1e-7, 1.0),))
    assert good.holds
    assert json.loads(good.to_json())["holds"] is True


def test_what_cannot_be_compared_is_named() -> None:
    """Faults, dtypes and degrees that there are not."""
    with pytest.raises(UnknownNameError, match="factor"):
        Fault("factr")
    with pytest.raises(UnknownNameError, match="fp64"):
        compare(Plan(), dtype="fp46")  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(UsageError, match="gather=int8, reduce=full"):
        compare(Plan(Layout(dp_shard=2), gather="int8"))
    with pytest.raises(UsageError, match="gather=full, reduce=int4"):
        compare(Plan(Layout(dp_shard=2), reduce="int4"))
    with pytest.raises(UsageError, match="dp_shrd=2"):
        plan_of("dp_shrd=2")
    assert plan_of("dp_shard=4, ep=2, secondary=2") == Plan(Layout(dp_shard=4, ep=2), secondary=2)


def test_the_small_model_fills_any_ep() -> None:
    """Its experts come out even for 3 processes too."""
    lm = small_model(Plan(Layout(dp_shard=3, ep=3)))
    assert lm.config.moe is not None
    assert lm.config.moe.num_experts == 12
