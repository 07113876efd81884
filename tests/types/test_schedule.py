"""Schedule: torch's text form, and every way of not being a schedule refused by name."""

import pytest
from private import private

from turnout.errors import CheckpointError, UsageError
from turnout.types import Action, Schedule

TWO = "0F0,0F1,0I0,0W0,0I1,0W1\n1F0,1B0,1F1,1B1\n"


def test_round_trips() -> None:
    schedule = Schedule.from_csv(TWO, name="two")
    assert (schedule.stages, schedule.ranks, schedule.microbatches, schedule.splits_backward) == (2, 2, 2, True)
    assert Schedule.from_csv(schedule.to_csv(), name="two") == schedule
    assert Schedule.from_json_dict(schedule.to_json_dict()) == schedule
    assert schedule.to_csv() == TWO


def test_the_digest_is_of_the_actions_alone() -> None:
    schedule = Schedule.from_csv(TWO, name="two")
    assert Schedule.from_csv(TWO, name="other").digest == schedule.digest
    other = Schedule.from_csv(TWO.replace("0I0,0W0,0I1,0W1", "0I0,0I1,0W0,0W1"), name="two")
    assert other.digest != schedule.digest


def test_pairs_and_parameters_have_torchs_text() -> None:
    text = "0UNSHARD,0F0,(0F1;0B0)OVERLAP_F_B,0B1,0RESHARD\n"
    schedule = Schedule.from_csv(text, name="one")
    assert schedule.to_csv() == text
    assert (schedule.count("F"), schedule.count("B"), schedule.count("UNSHARD"), schedule.microbatches) == (2, 2, 1, 2)


def test_the_text_is_what_torch_reads() -> None:
    schedules = private("torch.distributed.pipelining.schedules")
    for text in ("2F0", "0I11", "3W2", "1B0", "2UNSHARD", "2RESHARD", "(0F1;3B0)OVERLAP_F_B"):
        assert str(schedules._Action.from_str(text)) == text == str(Action.parse(text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0F0\n", "F of microbatch 0"),
        ("0F0,0I0\n", "FI of microbatch 0"),
        ("0F0,0B0,0W0\n", "FWB of microbatch 0"),
        ("0F0,0F0,0B0\n", "0F0 twice"),
        ("0F0,0B0,0F1\n", "F of microbatch 1"),
        ("0B0,0F0\n", "device 0 at 0B0"),
        ("0F0,0W0,0I0\n", "device 0 at 0W0"),
        ("0F0,0B0\n1B0,1F0\n", "device 1 at 1B0"),
        ("0F0,0F1,0B1,0B0\n1F0,1B0,1F1,1B1\n", None),
        ("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n", "device 0 at 0B0, device 1 at 1F1"),
        ("0F0,0B0\n2F0,2B0\n", "no action of stage 1"),
        ("0F0,1F0,1B0\n0B0\n", "device 1"),
        ("0F0,0B\n", "0B"),
        ("0F0,0UNSHARD,0B0\n", "0F0 must come between"),
        ("0UNSHARD,0F0,0RESHARD,0B0\n", "put 0UNSHARD before it"),
        ("", "none|no action|0 microbatches"),
    ],
)
def test_what_cannot_run_is_refused(text: str, says: str | None) -> None:
    if says is None:
        Schedule.from_csv(text, name="odd, and possible")
        return
    with pytest.raises(UsageError, match=says):
        Schedule.from_csv(text, name="wrong")


@pytest.mark.parametrize("text", ["F0", "0X0", "0F-1", "(0F0;0B0)", "(0F0)F", "0F0x"])
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="2F0"):
        Action.parse(text)


def test_a_foreign_json_is_refused() -> None:
    body = Schedule.from_csv(TWO, name="two").to_json_dict()
    for key, value in {
        "format": "other/1",
        "name": 3,
        "microbatches": True,
        "rank_of_stage": "0",
        "actions": [3],
    }.items():
        with pytest.raises(CheckpointError, match="to_json_dict"):
            Schedule.from_json_dict(body | {key: value})
    with pytest.raises(UsageError, match="device 1, which holds stage 0"):
        Schedule.from_json_dict(body | {"rank_of_stage": [1, 0]})
