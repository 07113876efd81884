"""A wire's thread: its order, what it waits for, and that nobody waits for ever for what failed."""

import time

import pytest

from turnout.errors import UsageError
from turnout.run.blocks.wire import Board, Slow, Wire


def test_tasks_go_in_the_given_order_each_once_what_it_needs_is_there() -> None:
    board, wire, seen = Board(), Wire(), list[str]()
    jobs = [(name, needs, lambda name=name: seen.append(name) or 1) for name, needs in (("b", ["a"]), ("c", []))]
    done = wire.play(jobs, board)
    time.sleep(0.01)
    assert seen == []  # c does not overtake b, which waits
    board.run("a", (), lambda: None)
    done.result(timeout=5)
    assert seen == ["b", "c"]
    wire.close()


def test_a_failure_reaches_whoever_waits() -> None:
    board, wire = Board(), Wire()

    def broken() -> int:
        raise RuntimeError("the wire is cut")

    done = wire.play([("a", (), broken)], board)
    with pytest.raises(RuntimeError, match="the wire is cut"):
        board.wait(["b"])
    with pytest.raises(RuntimeError, match="the wire is cut"):
        board.wait_either(["b"], ["c"])
    with pytest.raises(RuntimeError, match="the wire is cut"):
        done.result(timeout=5)
    wire.close()


def test_a_failure_on_the_chip_ends_the_wire() -> None:
    board, wire = Board(), Wire()
    done = wire.play([("a", ("never",), lambda: 1)], board)
    board.fail(RuntimeError("the chip is out"))
    with pytest.raises(RuntimeError, match="the chip is out"):
        done.result(timeout=5)
    wire.close()


def test_a_slow_wire_takes_alpha_and_beta_more() -> None:
    board, wire = Board(), Wire(slow=Slow(0.01, 1e-4))
    wire.play([("a", (), lambda: 100)], board).result(timeout=5)
    start, end = board.times["a"]
    assert end - start >= 0.02
    wire.close()


@pytest.mark.parametrize("wrong", [{"alpha_s": -1.0}, {"beta_s": float("nan")}])
def test_what_cannot_be_waited_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"must be at least 0 in turnout.run.Slow"):
        Slow(**wrong)
