"""Timeline: start times are longest paths; circles and bad input are refused by name."""

import itertools
import time

import numpy as np
import pytest

from turnout.errors import ShapeError, UsageError
from turnout.solve import timeline


def by_relaxation(order_R, duration_N, needs_N):
    """The plainest reference: raise every start until nothing moves."""
    edges = [(a, b, 0.0) for order in order_R for a, b in itertools.pairwise(order)]
    edges += [(need, task, lag) for task, needs in enumerate(needs_N) for need, lag in needs]
    start = np.zeros(len(duration_N))
    for _ in range(len(duration_N) + 1):
        for before, after, lag in edges:
            start[after] = max(start[after], start[before] + duration_N[before] + lag)
    return start


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("shared", [0.0, 0.3])
def test_every_start_is_the_longest_path(seed: int, shared: float) -> None:
    rng = np.random.default_rng(seed)
    count, resources = int(rng.integers(1, 25)), int(rng.integers(1, 5))
    order_R = [[] for _ in range(resources)]
    for task in rng.permutation(count).tolist():
        for r in {int(rng.integers(resources))} | {r for r in range(resources) if rng.random() < shared}:
            order_R[r].append(task)
    rank = {}  # a common order of all, so that there is no circle
    for task in rng.permutation(count).tolist():
        rank[task] = len(rank)
    order_R = [sorted(order, key=rank.__getitem__) for order in order_R]
    needs_N = [
        [(d, float(rng.normal())) for d in range(count) if rank[d] < rank[t] and rng.random() < 0.2]
        for t in range(count)
    ]
    duration_N = rng.random(count) * rng.integers(0, 2, count)
    played = timeline(order_R, duration_N, needs_N)
    np.testing.assert_allclose(played.start_N, by_relaxation(order_R, duration_N, needs_N), atol=1e-12)
    np.testing.assert_allclose(played.end_N - played.start_N, duration_N, atol=1e-12)
    assert played.makespan == played.end_N.max()


def test_a_task_on_two_resources_holds_both() -> None:
    played = timeline([[0, 1, 2], [3, 1, 4]], [1.0, 1.0, 1.0, 2.0, 1.0], [[]] * 5)
    assert played.start_N.tolist() == [0.0, 2.0, 3.0, 0.0, 3.0]


def test_a_circle_is_named() -> None:
    with pytest.raises(UsageError, match=r"1 waits for 2 waits for 1|2 waits for 1 waits for 2"):
        timeline([[0, 1], [2]], [1.0, 1.0, 1.0], [[], [(2, 0.0)], [(1, 0.0)]])
    with pytest.raises(UsageError, match="0 waits for 1 waits for 0"):  # through the orders alone
        timeline([[0, 1], [1, 0]], [1.0, 1.0], [[], []])


@pytest.mark.parametrize(
    ("order_R", "duration_N", "needs_N", "error", "says"),
    [
        ([[0]], [-1.0], [[]], ShapeError, "negative"),
        ([[0]], [float("nan")], [[]], ShapeError, "not finite"),
        ([[0]], [1.0], [], ShapeError, "needs of 0 tasks"),
        ([[0, 1]], [1.0], [[]], ShapeError, "got 1"),
        ([[0]], [1.0], [[(0, float("inf"))]], ShapeError, "lag"),
        ([[0, 0]], [1.0], [[]], UsageError, "task 0 twice"),
        ([[0]], [1.0, 1.0], [[], []], UsageError, "task 1 on none"),
    ],
)
def test_bad_input_is_refused(order_R, duration_N, needs_N, error, says) -> None:
    with pytest.raises(error, match=says):
        timeline(order_R, duration_N, needs_N)


def test_nothing_to_do_takes_no_time() -> None:
    assert timeline([], [], []).makespan == 0.0


def test_a_thousand_tasks_take_milliseconds() -> None:
    order_R = [list(range(r, 1000, 8)) for r in range(8)]
    needs_N = [[(task - 1, 0.1)] if task % 8 else [] for task in range(1000)]
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        timeline(order_R, np.ones(1000), needs_N)
        took.append(time.perf_counter() - begin)
    assert min(took) < 0.03, took  # some 2 ms on an idle core
