"""List scheduling leaves no resource idle while it could work; resources that slow each other down do so by kappa."""

import random

import pytest

from turnout.errors import UsageError
from turnout.solve import list_schedule, slowed_timeline, timeline


def drawn(chance: random.Random, count: int):
    resource = [chance.randrange(2) for _ in range(count)]
    seconds = [chance.choice((0.0, chance.random(), chance.random())) for _ in range(count)]
    needs = [[need for need in range(task) if chance.random() < 0.15] for task in range(count)]
    return resource, seconds, needs


def test_no_resource_idles_while_a_task_is_ready():
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    for _ in range(30):
        resource, seconds, needs = drawn(chance, 25)
        orders = list_schedule(resource, seconds, needs, [chance.random() for _ in resource])
        played = timeline(orders, seconds, [[(need, 0.0) for need in each] for each in needs])
        assert sorted(task for order in orders for task in order) == list(range(25)), f"seed {seed}"
        for task, each in enumerate(needs):
            ready = max((played.end_N[need] for need in each), default=0.0)
            work = [
                (played.start_N[other], played.end_N[other])
                for other in orders[resource[task]]
                if other != task and played.start_N[other] < played.start_N[task] and played.end_N[other] > ready
            ]
            busy = sum(min(end, played.start_N[task]) - max(start, ready) for start, end in work)
            assert busy == pytest.approx(played.start_N[task] - ready, abs=1e-9), f"seed {seed}"


def test_without_kappa_it_is_the_timeline():
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    for _ in range(30):
        resource, seconds, needs = drawn(chance, 25)
        orders = list_schedule(resource, seconds, needs, [chance.random() for _ in resource])
        plain = timeline(orders, seconds, [[(need, 0.0) for need in each] for each in needs])
        slowed = slowed_timeline(orders, seconds, needs, [[0.0, 0.0], [0.0, 0.0]])
        assert slowed.end_N == pytest.approx(plain.end_N, abs=1e-9), f"seed {seed}"
        more = slowed_timeline(orders, seconds, needs, [[0.0, 0.5], [0.25, 0.0]])
        assert plain.makespan - 1e-9 <= more.makespan <= 1.5 * plain.makespan + 1e-9, f"seed {seed}"


def test_kappa_by_hand():
    played = slowed_timeline([[0], [1]], [2.0, 1.0], [[], []], [[0.0, 1.0], [0.5, 0.0]])
    # The wire takes 1.5 in all, in which the chip does 0.75 of its 2; the rest is alone.
    assert played.end_N.tolist() == pytest.approx([2.75, 1.5])


def test_tasks_that_wait_for_each_other_are_refused():
    with pytest.raises(UsageError, match="wait for each other"):
        slowed_timeline([[0, 1]], [1.0, 1.0], [[1], []], [[0.0]])
