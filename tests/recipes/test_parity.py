"""Every supported layout has the gradients of one process, and a comparison that planted faults do not get past."""

import pytest
from processes import spawn

from turnout.recipes.parity import Parity, compare
from turnout.types.layout import Layout
from turnout.types.plan import Plan

TWO = [
    Plan(Layout(dp_replicate=2)),
    Plan(Layout(dp_shard=2, zero=0), microbatches=2),
    Plan(Layout(dp_shard=2, zero=1), microbatches=2),
    Plan(Layout(dp_shard=2, zero=2), microbatches=2),
    Plan(Layout(dp_shard=2, zero=3), microbatches=2),
    Plan(Layout(dp_shard=2, ep=2)),
    Plan(Layout(dp_shard=2, ep=2, zero=0), microbatches=2),
    Plan(Layout(dp_shard=2, ep=2), recompute=True),
]
FOUR = [
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
]


def together(ranks, cases: list[tuple[Plan, dict[str, str]]]) -> list[Parity]:
    return [compare(plan, **how) for plan, how in cases]


@pytest.mark.slow
@pytest.mark.parametrize("plans", [TWO, FOUR], ids=["two", "four"])
def test_every_layout_has_the_gradients_of_one_process(plans: list[Plan]) -> None:
    cases = [(plan, {"dtype": dtype}) for plan in plans for dtype in ("fp64", "fp32")]
    found = spawn(plans[0].layout.world, together, cases)[0]
    for each in found:
    assert all(each.holds for each in found), "\n\n".join(str(each) for each in found if not each.holds)


@pytest.mark.slow
def test_rounding_is_told_from_a_wrong_sum() -> None:
    """Over ten seeds fp32 is within its bound, or fp64 says that what is beyond it was rounding."""
    plan = Plan(Layout(dp_shard=2, ep=2))
    found = spawn(2, together, [(plan, {"seed": seed}) for seed in range(10)])[0]
    for e in found:
    assert all(each.holds for each in found)
