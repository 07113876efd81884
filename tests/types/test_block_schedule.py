"""A schedule of blocks says what is wrong with it, goes to JSON and back, and knows what needs what."""

import dataclasses
import json
import random

import pytest

from turnout.errors import CheckpointError, UsageError
from turnout.types import BlockCosts, BlockSchedule, BlockTask, Line


def tasks(text: str) -> tuple[BlockTask, ...]:
    return tuple(BlockTask.parse(name) for name in text.split())


def one_block() -> BlockSchedule:
    compute = tasks("A0.0 G0.0 E0.0 E0.1 Ex0.0 E'0.1 Ew0.0 G'0.0 A'0.0")
    wire = tasks("D0.0 D0.1 C0.0 C0.1 C'0.0 C'0.1 D'0.0 D'0.1 Re0.0 Ra0.0 Ra0.1")
    return BlockSchedule(1, 1, 2, compute, wire, dense_bytes=(8, 8), expert_bytes=(4,))


def test_a_whole_schedule_is_accepted_and_goes_round():
    schedule = one_block()
    schedule.check()
    body = json.loads(json.dumps(schedule.to_json_dict()))
    back = BlockSchedule.from_json_dict(body)
    assert back == schedule and back.digest == schedule.digest
    assert dataclasses.replace(schedule, turn="chunk").digest != schedule.digest
    with pytest.raises(CheckpointError, match="format"):
        BlockSchedule.from_json_dict({**body, "format": "turnout.plan/1"})
    with pytest.raises(UsageError, match=r"Z0\.0"):
        BlockSchedule.from_json_dict({**body, "compute": ["Z0.0"]})


@pytest.mark.parametrize(
    ("field", "old", "new", "words"),
    [
        ("wire", "C0.1 ", "", "without C0.1"),
        ("wire", "D0.1 C0.0", "D0.1 D0.1 C0.0", "there twice"),
        ("wire", "D0.0 ", "A0.0 ", "be on compute"),
        ("wire", "Ra0.1", "Ra0.1 Ra0.2", "with Ra0.2"),
        ("compute", "Ew0.0 ", "", "without Ew0.0"),
        ("compute", "A0.0 G0.0", "G0.0 A0.0", "waiting for the next"),
        ("wire", "D'0.0 D'0.1", "Ra0.0 D'0.0 D'0.1", "there twice"),
        ("wire", "C'0.0 C'0.1 D'0.0 D'0.1 Re0.0 Ra0.0", "Ra0.0 C'0.0 C'0.1 D'0.0 D'0.1 Re0.0", "waiting for the next"),
    ],
)
def test_what_is_wrong_is_said(field, old, new, words):
    schedule = one_block()
    text = " ".join(map(str, getattr(schedule, field)))
    assert old in text
    with pytest.raises(UsageError, match=words):
        dataclasses.replace(schedule, **{field: tasks(text.replace(old, new))}).check()


def test_parts_that_share_rows_need_each_other_whatever_the_rows():
    """The mapping by fractions never misses a pair that shares rows, for any number of rows."""
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    for _ in range(200):
        rows, parts, others = chance.randint(1, 40), chance.randint(1, 9), chance.randint(1, 9)
        schedule = BlockSchedule(1, others, parts, (), ())
        for chunk in range(parts):
            here = set(range(chunk * rows // parts, (chunk + 1) * rows // parts))
            for other in range(others):
                there = set(range(other * rows // others, (other + 1) * rows // others))
                if here & there:
                    assert other in schedule.sharing(chunk, of=parts, among=others), f"seed {seed}"


def test_needs():
    needs = one_block().needs()
    (straddling,) = tasks("D0.1")
    assert needs[straddling] == tasks("G0.0")
    assert set(needs[BlockTask("Re", 0, 0)]) == set(tasks("E'0.1 Ew0.0"))
    assert set(needs[BlockTask("C'", 0, 0)]) == set(tasks("C0.0 C0.1"))
    by_chunk = dataclasses.replace(one_block(), turn="chunk").needs()
    assert by_chunk[BlockTask("C'", 0, 0)] == tasks("C0.0")
    late = dataclasses.replace(one_block(), carried=tasks("Re0.0")).needs()
    assert late[BlockTask("Re", 0, 0)] == () and BlockTask("Re", 0, 0) in late[BlockTask("A", 0, 0)]


def test_costs():
    costs = BlockCosts.even(attention=1.0, experts=2.0, dispatch=0.5, reduce=0.25, start=0.1, rows=10)
    schedule = one_block()
    assert costs.seconds(BlockTask("E", 0, 1), schedule) == pytest.approx(1.1)
    assert [costs.part(chunk, 3) for chunk in range(3)] == [3, 3, 4]
    assert BlockCosts.from_json_dict(json.loads(json.dumps(costs.to_json_dict()))) == costs
    with pytest.raises(UsageError, match="not below 0"):
        Line(-1.0)
    with pytest.raises(UsageError, match="rows"):
        dataclasses.replace(costs, rows=0)
    with pytest.raises(UsageError, match="both take time"):
        dataclasses.replace(costs, dispatch_inner=Line(1.0))


def test_a_window_needs_parts_that_do_not_meet():
    with pytest.raises(UsageError, match="window"):
        dataclasses.replace(one_block(), window=1)
