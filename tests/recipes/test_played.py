"""A plan's block schedule has the gradients of one process, and faults planted in it do not get past a comparison."""

import dataclasses
from typing import Any

import pytest
from processes import spawn

from turnout.decide.device import block_schedule
from turnout.errors import UsageError
from turnout.recipes.overlaps import check_played, told
from turnout.recipes.parity import Parity, compare
from turnout.recipes.planted import FAULTS, PLAYED, Fault
from turnout.recipes.played import fitted
from turnout.run.ranks.processes import Ranks
from turnout.types import BlockCosts, BlockSchedule
from turnout.types.layout import Layout
from turnout.types.plan import Plan


def planned(layout: Layout, method: str = "turnout", *, blocks: int = 2, sums: bool = False) -> Plan:
    """With pieces of some other model's gradients."""
    copies = layout.data_ranks > layout.ep
    sizes = {"attention": 1.0, "experts": 1.2, "dispatch": 0.6, "reduce": 0.9, "start": 0.02}
    costs = BlockCosts.even(**sizes, expert_reduce=0.5 * copies, most_chunks=3)
    costs = dataclasses.replace(costs, sums=sums)
    return Plan(layout, overlap=block_schedule(costs, blocks=blocks, method=method))


FOUR = Layout(dp_shard=4, ep=4, zero=0)
COPIED = Layout(dp_shard=4, ep=2, zero=0)


def all_of(ranks: Ranks, cases: list[tuple[Plan, dict[str, Any]]]) -> list[Parity]:
    return [compare(plan, **how) for plan, how in cases]


@pytest.mark.slow
def test_played_plans_have_the_gradients_of_one_process_and_no_fault_passes() -> None:
    """Also the turn by chunk, and micro-batches; each planted fault is where it was planted."""
    copied = planned(COPIED)
    plans = [
        copied,
        planned(FOUR, sums=True, blocks=1),
        dataclasses.replace(planned(COPIED, "flowmoe", blocks=3), microbatches=2),
        planned(Layout(dp_replicate=2, dp_shard=2, ep=2, zero=0), "tutel"),
        planned(Layout(dp_shard=4, zero=0), "fsmoe"),
    ]
    cases: list[tuple[Plan, dict[str, Any]]] = [(plan, {"dtype": "fp64"}) for plan in plans]
    cases += [(copied, {})] + [(copied, {"plant": fault}) for fault in (*FAULTS, *PLAYED)]
    found = spawn(4, all_of, cases)[0]
    right, wrong = found[: len(plans) + 1], dict(zip((*FAULTS, *PLAYED), found[len(plans) + 1 :], strict=True))
    assert all(each.holds for each in right), "\n\n".join(str(each) for each in right if not each.holds)
    assert [name for name, each in wrong.items() if each.holds] == []
    ratios = {
        name: {round(gap.ratio, 3) for gap in each.failed if gap.what == "gradient"} for name, each in wrong.items()
    }
    assert ratios["factor"] == {2.0}
    assert ratios["average"] == {0.25}
    assert ratios["twice"] == {4.0}
    for name in ("skip", "twice"):
        assert all("blocks.0" in gap.name for gap in wrong[name].failed if gap.what == "gradient"), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layout": Layout(dp_shard=4, ep=2)}, "zero must be 0 where a plan has an overlap in turnout train; got 3. N"),
        ({"layout": Layout(pp=2, dp_shard=2, ep=2, zero=0)}, "pp must be 1 .* use dp_shard=4"),
        ({"gather": "bf16"}, "gather must be 'full'"),
        ({"reduce": "int4"}, "reduce must be 'full'"),
        ({"recompute": True}, "recompute must be False"),
        ({"secondary": 2}, "secondary must be None"),
        ({"layout": Layout(zero=0)}, "the overlap must be one for several processes"),
        (
            {"overlap": planned(FOUR, sums=True, blocks=1).overlap},
            "turn must be whole .* got chunk.* turnout plan MODEL",
        ),
    ],
)
def test_what_is_not_played_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    plan = planned(COPIED, "tutel")
    check_played(plan)
    with pytest.raises(UsageError, match=said):
        check_played(dataclasses.replace(plan, **change))


def test_pieces_are_fitted_to_a_model() -> None:
    schedule = BlockSchedule(1, 1, 1, (), (), dense_bytes=(1 << 20, 4, 1 << 18), expert_bytes=(1 << 20,))
    made = fitted(schedule, 1000 * 8 + 4, 20)
    assert (sum(made.dense_bytes), len(made.dense_bytes), min(made.dense_bytes), made.expert_bytes) == (
        8004,
        3,
        8,
        (20,),
    )
    assert fitted(schedule, sum(schedule.dense_bytes), 1 << 20) == schedule


def test_a_fault_of_schedules_wants_one() -> None:
    with pytest.raises(UsageError, match="the fault 'twice' must have one"):
        Fault("twice").plant(None, None)  # pyrefly: ignore[bad-argument-type]


def test_what_was_measured_stands_beside_what_was_foreseen() -> None:
    plan = dataclasses.replace(planned(COPIED, "none"), foreseen_s=0.0123)
    said = "a pass through the blocks and back took 13.4 ms, where 12.3 ms were foreseen; 75% of the wire's work ran"
    assert told(plan, 0.0134, 0.75).startswith(said)
    assert "foreseen" not in told(planned(COPIED, "none"), 0.0134, 0.75)
