"""Processes find each other, also after a crash; they agree before they begin, and miss who is gone."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from processes import outcomes, spawn

from turnout.errors import DataError, UsageError
from turnout.run.ranks import processes
from turnout.run.ranks.processes import Ranks, agree
from turnout.run.ranks.watch import answering, lead


def summed(ranks: Ranks, factor: float) -> tuple[int, float]:
    total = torch.tensor([factor * (ranks.rank + 1)])
    dist.all_reduce(total)
    agree("the plan", "the same")
    return ranks.rank, total.item()


@pytest.mark.slow
def test_ranks_come_together() -> None:
    assert spawn(3, summed, 2.0) == [(0, 12.0), (1, 12.0), (2, 12.0)]


def disagreeing(ranks: Ranks) -> None:
    agree("the seed", "7")
    agree("the weights", "other" if ranks.rank == 2 else "x" * 1000, fix="start from one file")


@pytest.mark.slow
def test_who_differs_is_named_on_every_rank() -> None:
    found = outcomes(4, disagreeing)
    assert len({outcome.error for outcome in found}) == 1, [outcome.trace for outcome in found]
    assert found[0].error.startswith(
        "UsageError: the weights must be the same on every rank in turnout.run.ranks; got other on rank 2; xxx"
    ), found[0].error
    assert found[0].error.endswith("x on ranks 0, 1 and 3. Nearest fix: start from one file.")


def hanging(ranks: Ranks, how: str) -> str:
    for step in range(3):
        if ranks.rank == 2 and step == 1:
            if how.startswith("hung"):
                time.sleep(600)
            if how == "dead":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
        with answering(ranks, lambda step=step: f"step {step}"):
            if ranks.rank == 2 and step == 1:
                raise UsageError("no such thing")
            if ranks.rank == 1 and step == 1 and how == "hung, told by another operation":
                time.sleep(ranks.timeout_s)  # gloo says this to what waits beside an operation that was not answered
                raise RuntimeError("Application timeout caused pair closure")
            dist.all_reduce(torch.ones(10))
    return "done"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("hung", "in step 1: rank 2 did not answer after 5 s: alive, and elsewhere."),
        ("hung, told by another operation", "in step 1: rank 2 did not answer after 5 s: alive, and elsewhere."),
        ("dead", "in step 1: rank 2 did not answer: dead, or stopped."),
        ("stopped", "in step 1: rank 2 did not answer: dead, or stopped."),
        ("failed", "in step 1: rank 2 stopped with UsageError: no such thing."),
    ],
)
def test_who_is_gone_is_named_on_every_other_rank(how: str, said: str) -> None:
    found = outcomes(4, hanging, how, wait_s=5, patience_s=10)
    for rank in (0, 1, 3):
        assert said in found[rank].error, found[rank]
        assert found[rank].exit_code == 1
    if how == "failed":
        assert found[2].error == "UsageError: no such thing"


def late(rank: int) -> float:
    """A rank whose launch counts restarts otherwise than the others', in a store full of a dead group's keys."""
    sums = []
    for attempt in range(3):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt if rank < 2 else 0)
        processes.start(timeout_s=30, device="cpu")
        total = torch.ones(1)
        dist.all_reduce(total)
        sums.append(total.item())
        processes.end()
    return sum(sums)


@pytest.mark.slow
def test_a_group_starts_again_in_the_same_store() -> None:
    found = outcomes(3, late, group=False)
    assert [outcome.value for outcome in found] == [9.0] * 3, [outcome.trace for outcome in found]


def absent(rank: int) -> None:
    if rank == 1:
        return
    processes.start(timeout_s=2, device="cpu")


@pytest.mark.slow
def test_who_never_arrives_is_named() -> None:
    found = outcomes(3, absent, group=False)
    for rank in (0, 2):
        assert "all 3 ranks must arrive within 2 s" in found[rank].error, found[rank]
        assert "got nothing from rank 1. " in found[rank].error


def led(ranks: Ranks, how: str) -> object:
    def action() -> object:
        time.sleep(3)  # longer than others wait for a sign of life
        if how == "refuses":
            raise DataError("no text")
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"step": 3}

    return [lead(ranks, lambda: 1), lead(ranks, action), processes.shared(ranks.rank * "é")]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["works", "refuses", "dies"])
def test_rank_0_does_it_for_all(how: str) -> None:
    found = outcomes(3, led, how, wait_s=2)
    if how == "works":
        assert [outcome.value for outcome in found] == [[1, {"step": 3}, ["", "é", "éé"]]] * 3, found
    if how == "refuses":
        assert [outcome.error for outcome in found] == ["DataError: no text"] * 3
    if how == "dies":
        assert all("got rank 0 did not answer, dead or hung" in outcome.error for outcome in found[1:]), found


@pytest.mark.parametrize(("rank", "world"), [("-1", "2"), ("2", "2"), ("0", "two")])
def test_a_launch_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch, rank: str, world: str) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", world), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError):
        processes.start(timeout_s=1)
