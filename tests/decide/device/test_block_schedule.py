"""Schedules of blocks: never longer than the published ones, within memory, and shortest where that can be proved."""

import dataclasses
import importlib
import itertools
import random

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from benchmarks.block_schedule import beyond, gap_closed, of_the_card, one
from turnout.decide.device import block_schedule
from turnout.decide.device.block_exact import exact
from turnout.decide.device.block_orders import RULES, Found, Shape, best, graph, pieces
from turnout.errors import UnknownNameError, UsageError
from turnout.measure import simulate_block
from turnout.types import BlockCosts, BlockSchedule, BlockTask

PLANNER = importlib.import_module("turnout.decide.device.block_schedule")
PUBLISHED = tuple(PLANNER.PUBLISHED)


def never_longer(records):
    for record in records:
        least = min(record[method] for method in PUBLISHED)
        assert record["turnout"] <= least * (1 + 1e-9), record
        assert 1 - 1e-9 <= record["turnout"] and record["flowmoe"] > 0, record


def test_never_longer_than_the_published_ones():
    seed = random.randrange(10**6) * 10
    print("seed", seed)
    never_longer([one(seed), one(seed + 7), one(seed + 8)])


@pytest.mark.slow
def test_never_longer_on_many_profiles_and_half_as_far_from_the_bound():
    """The goal is half of FlowMoE's median distance; two fifths are seen whatever the draw."""
    records = [one(seed) for seed in range(500, 530)]
    never_longer(records)
    card = [record for record in records if record["seed"] % 10 < 7]
    print("gone of the distance to the bound:", gap_closed(card))
    assert gap_closed(card) > 0.4
    # Its paper has 13 to 57 % less time than other systems where these are 33 to 36 % of it.
    many = [one(seed, methods=("tutel", "flowmoe")) for seed in range(500, 620) if seed % 10 < 7]
    found = [record["flowmoe"] / record["tutel"] for record in many if 0.3 <= record["share"] <= 0.4]
    print("FlowMoE over Tutel:", len(found), "profiles")
    assert 0.43 <= float(np.median(found)) <= 0.90


@pytest.mark.parametrize("method", PLANNER.METHODS)
def test_every_method_prints_a_whole_schedule_and_does_as_its_paper_does(method):
    seed = random.randrange(10**6)
    for draw in (of_the_card, beyond):
        costs, blocks = draw(seed)
        plan = block_schedule(costs, blocks=min(blocks, 2), method=method)
        plan.check()
        times = simulate_block(plan, costs)
        assert times.makespan_s >= times.bound_s * (1 - 1e-9), f"seed {seed}"
        halves = {task.kind for task in plan.tasks} & {"Ex", "Ew", "Ax", "Aw"}
        if method != "turnout":
            assert not halves and plan.turn == "whole", f"seed {seed}"
            assert plan.attention_chunks in ((1, plan.expert_chunks) if method == "flowmoe" else (1,)), f"seed {seed}"
        if method in ("none", "tutel"):
            wire = [task.kind in ("Ra", "Re") for task in plan.wire]
            assert wire == sorted(wire), f"seed {seed}: reductions are behind all else"
        assert block_schedule(costs, blocks=min(blocks, 2), method=method) == plan, f"seed {seed}"


def test_flowmoe_sends_what_is_waited_for_before_a_reduction():
    costs, _ = of_the_card(3)
    plan = block_schedule(costs, blocks=3, method="flowmoe")
    times = simulate_block(plan, costs)
    needs, ended = plan.needs(), {task: end for task, _, end in times.spans}
    for task, start, _ in times.spans:
        if task.kind == "Ra":
            waiting = [
                other
                for other, began, _ in times.spans
                if other.resource == "wire" and other.kind != "Ra" and began > start
                if max((ended[need] for need in needs[other]), default=0.0) <= start - 1e-9
            ]
            assert not waiting, f"{task} went before {waiting}"


def milp_shortest(found: Found) -> float:
    """The least makespan by mixed-integer programming: starts, and for each pair on a resource which is first."""
    made, count = found.graph, len(found.graph.tasks)
    ancestors: list[set[int]] = [set() for _ in range(count)]
    for _ in range(count):
        for task, needs in enumerate(made.needs):
            ancestors[task] |= set(needs).union(*(ancestors[need] for need in needs))
    pairs = [
        (a, b)
        for a, b in itertools.combinations(range(count), 2)
        if made.resource[a] == made.resource[b] and a not in ancestors[b] and b not in ancestors[a]
    ]
    width, horizon = count + 1 + len(pairs), sum(made.seconds)
    rows, least = [], []

    def at_least(value: float, **coefficients: float) -> None:
        row = np.zeros(width)
        for name, coefficient in coefficients.items():
            row[int(name[1:])] = coefficient
        rows.append(row)
        least.append(value)

    for task, needs in enumerate(made.needs):
        at_least(made.seconds[task], **{f"v{count}": 1.0, f"v{task}": -1.0})
        for need in needs:
            at_least(made.seconds[need], **{f"v{task}": 1.0, f"v{need}": -1.0})
    for number, (a, b) in enumerate(pairs):
        choice = f"v{count + 1 + number}"
        at_least(made.seconds[a] - horizon, **{f"v{b}": 1.0, f"v{a}": -1.0, choice: -horizon})
        at_least(made.seconds[b], **{f"v{a}": 1.0, f"v{b}": -1.0, choice: horizon})
    goal, kind = np.zeros(width), np.r_[np.zeros(count + 1), np.ones(len(pairs))]
    goal[count] = 1.0
    bounds = Bounds(np.zeros(width), np.r_[np.full(count + 1, horizon), np.ones(len(pairs))])
    solved = milp(
        goal, constraints=LinearConstraint(np.array(rows), lb=np.array(least)), bounds=bounds, integrality=kind
    )
    assert solved.success, solved.message
    return float(solved.fun)


@pytest.mark.parametrize("shape", [Shape(2, 2), Shape(2, 2, 2, halve_experts=True, by_chunk=True)])
def test_branch_and_bound_finds_what_mixed_integer_programming_finds(shape):
    for seed in range(3):
        costs, _ = of_the_card(seed)
        found = exact(best(costs, 1, [shape]))
        assert found.proved
        assert found.found.seconds == pytest.approx(milp_shortest(found.found), rel=1e-6), f"seed {seed}"


@pytest.mark.slow
def test_the_gap_to_the_exact_one_at_small_size():
    """Over every equal degree up to 3, halves, turn and pieces up to 2: ours is no longer than the best of them all."""
    gaps = []
    # Two blocks of seed 22 end at the limit of nodes, unproved: nothing is known of their gap.
    for seed, blocks in ((20, 1), (20, 2), (21, 1), (22, 1)):
        costs, _ = of_the_card(seed)
        costs = dataclasses.replace(costs, most_chunks=3)
        shapes = itertools.product((1, 2, 3), (1, 2), *[(False, True)] * 3)
        shortest = float("inf")
        for degree, count, *flags in shapes:
            shape = Shape(degree, degree, count, *flags)
            found = exact(best(costs, blocks, [shape], tuple(RULES)), below=shortest)
            assert found.proved, (seed, blocks, shape)
            shortest = min(shortest, found.found.seconds)
        ours = simulate_block(block_schedule(costs, blocks=blocks), costs).makespan_s
        gaps.append(ours / shortest - 1)
    print("gaps to the exact:", [f"{gap:.4f}" for gap in gaps])
    assert max(gaps) <= 0.01 and float(np.median(gaps)) <= 0.001


def test_chunks_kept_for_the_backward_pass_stay_within_the_memory():
    costs, _ = of_the_card(5)
    for most in (2.0, 1.0, 0.5):
        plan = block_schedule(costs, blocks=2, memory_blocks=most)
        assert simulate_block(plan, costs).peak_blocks <= most + 1e-9
    free = simulate_block(block_schedule(costs, blocks=2), costs)
    tight = simulate_block(block_schedule(costs, blocks=2, memory_blocks=0.5), costs)
    assert tight.peak_blocks < free.peak_blocks and free.makespan_s <= tight.makespan_s


def test_carried_reductions_are_no_slower_and_their_block_waits_for_them():
    costs = BlockCosts.even(attention=0.5, experts=0.5, dispatch=0.2, reduce=1.0, start=0.01)
    plain, free = (block_schedule(costs, blocks=3, carry=carry) for carry in (False, True))
    assert simulate_block(free, costs).makespan_s <= simulate_block(plain, costs).makespan_s * (1 + 1e-9)
    found = best(costs, 3, [Shape(2, 2, 2, carry=1)], tuple(RULES))
    late = found.graph.schedule(found.orders, "by hand")
    late.check()
    assert {one.block for one in late.carried} == {1, 2} and BlockSchedule.from_json_dict(late.to_json_dict()) == late
    times = simulate_block(late, costs)
    assert times.makespan_s == pytest.approx(found.seconds) and times.period_s <= times.makespan_s * (1 + 1e-9)
    ended = {task: end for task, _, end in times.spans}
    for task, start, _ in times.spans:
        if task.kind == "A":
            assert all(ended[one] <= start + 1e-9 for one in late.carried if one.block == task.block)


def test_what_is_left_out_is_not_used():
    costs, _ = of_the_card(11)
    plan = block_schedule(costs, blocks=2, without=("turn", "halves", "unequal"))
    assert plan.turn == "whole" and plan.attention_chunks == plan.expert_chunks
    assert not {task.kind for task in plan.tasks} & {"Ex", "Ew", "Ax", "Aw"}
    summed = dataclasses.replace(costs, sums=False)
    assert block_schedule(summed, blocks=2).turn == "whole"


def test_chunks_of_the_sequence_go_forth_and_back_in_order():
    costs = dataclasses.replace(of_the_card(2)[0], cut="sequence")
    plan = block_schedule(costs, blocks=2)
    began = {task: start for task, start, _ in simulate_block(plan, costs).spans}
    forth = [began[BlockTask("A", 0, chunk)] for chunk in range(plan.attention_chunks)]
    kind = next(kind for kind in ("A'", "Ax") if BlockTask(kind, 0, 0) in began)
    back = [began[task] for task in sorted(began) if task.kind[0] == "A" and task.kind in ("A'", "Ax") and task[1] == 0]
    assert forth == sorted(forth) and back and kind
    ordered = sorted((task.chunk, began[task]) for task in began if task.kind in ("A'", "Ax") and task.block == 0)
    assert [start for _, start in ordered] == sorted((start for _, start in ordered), reverse=True)


@pytest.mark.slow
def test_many_blocks_are_planned_too():
    costs, _ = of_the_card(9)
    plan = block_schedule(costs, blocks=9)
    shortest = min(
        simulate_block(block_schedule(costs, blocks=9, method=method), costs).makespan_s for method in PUBLISHED
    )
    assert simulate_block(plan, costs).makespan_s <= shortest * (1 + 1e-9)


def test_what_cannot_be_is_refused():
    costs, _ = of_the_card(0)
    with pytest.raises(UnknownNameError, match="tutel"):
        block_schedule(costs, blocks=1, method="tutell")
    with pytest.raises(UnknownNameError, match="halves"):
        block_schedule(costs, blocks=1, without=("halfs",))
    with pytest.raises(UsageError, match="at least 1"):
        block_schedule(costs, blocks=0)
    with pytest.raises(UsageError, match=r"at least 0\.125"):
        block_schedule(costs, blocks=2, memory_blocks=0.1)
    with pytest.raises(UsageError, match="method='turnout'"):
        block_schedule(costs, blocks=2, memory_blocks=1.0, method="tutel")
    with pytest.raises(UsageError, match="meet"):
        block_schedule(dataclasses.replace(costs, sums=False), blocks=2, memory_blocks=1.0)


def test_pieces_are_all_of_the_gradient():
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    for _ in range(100):
        size, count = chance.randint(1, 10**6), chance.randint(1, 20)
        assert sum(pieces(size, size * chance.randint(1, 3), count)) == size, f"seed {seed}"


def test_chip_and_wire_that_slow_each_other_are_planned_for():
    costs = dataclasses.replace(of_the_card(4)[0], compute_slowed=0.3, wire_slowed=0.2)
    found = graph(costs, 2, Shape(2, 2))
    assert found.slowed is not None
    plan = block_schedule(costs, blocks=2)
    slow, fast = (simulate_block(plan, each).makespan_s for each in (costs, of_the_card(4)[0]))
    assert slow > fast
