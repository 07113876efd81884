"""A plan goes to disk and back whole, and refuses what does not go together."""

import dataclasses

import pytest

from turnout.errors import CheckpointError, UnknownNameError, UsageError
from turnout.types import Action, BlockSchedule, Cluster, Layout, Placement, Plan, Schedule


def whole() -> Plan:
    actions = [[Action(0, "F", 0), Action(0, "B", 0)], [Action(1, "F", 0), Action(1, "B", 0)]]
    return Plan(
        Layout(pp=2, dp_shard=2, ep=2),
        stages=(1, 3),
        gather="int8",
        secondary=1,
        actions=Schedule.of("own", actions),
        placement=Placement.contiguous((4,), devices=2),
    )


def test_it_comes_back_whole(tmp_path):
    plan = whole()
    plan.save(tmp_path / "plan.json")
    assert Plan.open(tmp_path / "plan.json") == plan
    assert Plan.open(tmp_path / "plan.json").digest == plan.digest != dataclasses.replace(plan, gather="full").digest


def test_every_part_has_its_json():
    """What is nested in a plan is written by itself, so a new part must say how."""
    assert {Schedule, BlockSchedule, Placement} <= {
        kind for field in dataclasses.fields(Plan) for kind in getattr(field.type, "__args__", ())
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"microbatches": 2}, "actions must be for pp=2 and microbatches=2"),
        ({"stages": (1, 2, 3)}, "a multiple of pp=2"),
        ({"secondary": 3}, "divide dp_shard=2"),
        ({"placement": Placement.contiguous((4,), devices=4)}, "the ep=2 devices"),
        ({"microbatches": 0}, "at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(change, said):
    with pytest.raises(UsageError, match=said):
        dataclasses.replace(whole(), **change)


def test_recomputing_is_not_for_split_passes():
    with pytest.raises(UsageError, match="splits the backward pass"):
        Plan(Layout(pp=2), schedule="ZBVZeroBubble", microbatches=4, recompute=True)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"format": "turnout.plan/0"}, CheckpointError, "turnout plan"),
        ({"layuot": {}}, UnknownNameError, "layout"),
        ({"layout": {"pp": 0}}, UsageError, "at least 1"),
        ({"layout": {"ep": 2}}, UsageError, "Nearest fix: pass ep=1"),
        ({"gather": "int3"}, UsageError, "full or bf16 or int8"),
        ({"actions": {"name": 3}}, CheckpointError, "schedule"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(change, error, said):
    with pytest.raises(error, match=said):
        Plan.from_json_dict({**Plan().to_json_dict(), **change})


def test_a_cluster_is_read_from_toml(tmp_path):
    (tmp_path / "cluster.toml").write_text('[cluster]\nnodes = 2\ndevices_per_node = 8\nname = "ours"\n')
    assert Cluster.open(tmp_path / "cluster.toml").devices == 16
    for text, said in (("nodes = ", "TOML"), ("node = 2", "Did you mean 'nodes'"), ("nodes = 0", "above 0")):
        (tmp_path / "cluster.toml").write_text(text)
        with pytest.raises((CheckpointError, UsageError), match=said):
            Cluster.open(tmp_path / "cluster.toml")
    with pytest.raises(CheckpointError, match=r"is not there|No such file"):
        Cluster.open(tmp_path / "none.toml")
