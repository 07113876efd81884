"""The search is never worse than what is published, stays within the memory, and is near a known optimum."""

import random

import pytest
from private import private

from turnout.decide import device
from turnout.errors import UsageError
from turnout.solve import pipeline
from turnout.types import Schedule, StageCosts

# Qi et al., 2024: ms of F, I, W and a message; p; and m, with the rates of the authors' programs: ZB-1p, ZB-2p, ZBV.
PROFILES = {
    "1.5B": (8, (18.522, 18.086, 9.337, 0.601), {24: (0.1585, 0.0433, 0.0703), 32: (0.1238, 0.0036, 0.0536), 64: None}),
    "6.2B": (8, (29.718, 29.444, 19.927, 0.527), {24: (0.1323, 0.0029, 0.0403), 32: None, 64: None}),
    "14.6B": (16, (11.347, 11.248, 8.132, 0.377), {48: (0.1397, 0.0066, 0.0498), 64: None, 128: None}),
    "28.3B": (32, (10.419, 10.207, 7.715, 0.408), {96: (0.1421, 0.0038, 0.0530), 128: None, 256: None}),
}
SETTINGS = [
    pytest.param(model, m, marks=[pytest.mark.slow] if p * m > 200 else [])
    for model, (p, _, ms) in PROFILES.items()
    for m in ms
]


@pytest.mark.parametrize(("model", "m"), SETTINGS)
def test_no_worse_than_the_authors_heuristic(model: str, m: int) -> None:
    p, (forward, input, weight, send), rates = PROFILES[model]
    costs = StageCosts.even(p, forward=forward, input=input, weight=weight, send=send)
    for place, memory in enumerate((p, 2 * p)):
        found = device.search(costs, p, m, memory=memory, barrier=False, tries=40)
        theirs = pipeline(device.zb_automatic(costs, m, memory=memory), costs)
        times = pipeline(found.schedule, costs)
        assert times.peak_R.max() <= memory + 1e-9
        assert times.span <= theirs.span + 1e-9
        if rates[m] is not None:
            assert times.span_bubble <= rates[m][place] + 5e-5


@pytest.mark.parametrize("model", ["1.5B", "6.2B"])
def test_a_v_no_worse_than_the_authors_heuristic(model: str) -> None:
    p, (forward, input, weight, send), rates = PROFILES[model]
    half = StageCosts.cut(StageCosts.even(p, forward=forward, input=input, weight=weight, send=send), 2)
    found = device.search(half, p, 24, memory=p, barrier=False, tries=20)
    times = pipeline(found.schedule, half)
    assert times.span_bubble <= rates[24][2] + 5e-5 and times.peak_R.max() <= p + 1e-9


def uneven(rng: random.Random, stages: int) -> StageCosts:
    each = [tuple(rng.uniform(0.2, 2.0) for _ in range(stages)) for _ in "FIW"]
    held = tuple(rng.uniform(0.5, 1.5) for _ in range(stages))
    return StageCosts(*each, send=rng.choice((0.0, rng.uniform(0, 0.5))), activation_S=held, kept=rng.random())


def from_torch(name: str, p: int, m: int, chunks: int | None) -> Schedule | None:
    """Torch's own order; None where it has none for these counts."""
    visualizer = private("torch.distributed.pipelining._schedule_visualizer")
    try:
        orders = visualizer.get_schedule_ops(name, p, m, chunks)
    except (ValueError, AssertionError):
        return None
    lines = [[str(a) for a in order if a is not None and "REDUCE_GRAD" not in str(a)] for order in orders]
    return Schedule.from_csv("".join(",".join(line) + "\n" for line in lines), name=name)


@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(s, marks=pytest.mark.slow) for s in range(6, 40))])
def test_never_worse_than_any_of_torchs(seed: int) -> None:
    """With uneven stages, on all of them: torch's own orders, played by our simulator."""
    rng = random.Random(seed)
    p, chunks = rng.randint(2, 4), rng.choice((1, 2, 3))
    m = rng.choice((p, p + 1, 2 * p, 3 * p))
    costs = uneven(rng, p * chunks)
    found = device.search(costs, p, m, tries=20, seed=seed)
    names = ["GPipe"] if chunks == 1 else ["Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble"]
    names += ["ZBVZeroBubble", "DualPipeV"] if chunks == 2 else []
    theirs = [from_torch(name, p, m, None if chunks == 1 else chunks) for name in names]
    theirs += [device.one_f_one_b(p, m)] if chunks == 1 else []  # whose picture torch draws with microbatches too many
    times = {each.name: pipeline(each, costs).makespan for each in theirs if each is not None}
    assert times and found.time <= min(times.values()) + 1e-9, (seed, times)
    assert found.time == pytest.approx(pipeline(found.schedule, costs).makespan, abs=1e-9)


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(s, marks=pytest.mark.slow) for s in range(5, 25))])
def test_within_two_percent_of_the_optimum(seed: int) -> None:
    rng = random.Random(seed)
    m = rng.randint(1, 3 if seed < 5 else 4)
    costs = uneven(rng, 3)
    memory = rng.choice((None, *(max(costs.held_S) * k for k in (1, 2, 3))))
    best = device.exact_schedule(costs, m, memory=memory)
    found = device.search(costs, 3, m, memory=memory, seed=seed)
    least, times = pipeline(best, costs), pipeline(found.schedule, costs)
    assert least.makespan - 1e-5 <= times.makespan <= 1.02 * least.makespan, (seed, m, memory)
    for each in (least, times):
        assert memory is None or each.peak_R.max() <= memory + 1e-6


@pytest.mark.parametrize("seed", range(8))
def test_a_limit_of_memory_is_kept(seed: int) -> None:
    rng = random.Random(seed)
    p, chunks = rng.randint(2, 4), rng.choice((1, 2))
    m, costs = rng.randint(2, 8), uneven(rng, p * chunks)
    memory = rng.uniform(1.5, 4.0) * max(costs.held_S) * chunks
    found = device.search(costs, p, m, memory=memory, tries=20)
    assert pipeline(found.schedule, costs).peak_R.max() <= memory + 1e-9
    free = device.search(costs, p, m, tries=20)
    assert free.time <= found.time * 1.05  # more room is not worse but for the luck of the moves


def test_overhead_makes_it_fuse_backwards() -> None:
    """Where an action costs more than it takes, I and W of their own do not pay."""
    costs = StageCosts.even(2, forward=0.01, input=0.01, weight=0.01, overhead=1.0)
    assert not device.search(costs, 2, 4, tries=20).schedule.splits_backward


def test_the_program_is_brute_force_on_the_smallest() -> None:
    """All orders of two devices and two microbatches."""
    import itertools

    from turnout.types import Action

    costs = StageCosts((1.0, 1.7), (0.6, 1.1), (0.9, 0.4), send=0.3)
    lines = [
        line
        for line in itertools.permutations([(kind, m) for kind in "FIW" for m in (0, 1)])
        if all(line.index((a, m)) < line.index((b, m)) for m in (0, 1) for a, b in ("FI", "IW"))
    ]
    least = float("inf")
    for pair in itertools.product(lines, repeat=2):
        try:
            schedule = Schedule("any", tuple(tuple(Action(s, k, m) for k, m in pair[s]) for s in (0, 1)), (0, 1), 2)
        except UsageError:
            continue
        least = min(least, pipeline(schedule, costs).makespan)
    assert pipeline(device.exact_schedule(costs, 2), costs).makespan == pytest.approx(least, abs=1e-6)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="cut the network into 3 or 6 stages"):
        device.search(StageCosts.even(4), 3, 4)
    with pytest.raises(UsageError, match="pass memory=1 at least"):
        device.search(StageCosts.even(4), 4, 4, memory=0.5)
    with pytest.raises(UsageError, match="at most 60"):
        device.exact_schedule(StageCosts.even(8), 8)


def test_the_same_seed_finds_the_same() -> None:
    costs = uneven(random.Random(5), 4)
    first, second = (device.search(costs, 4, 6, tries=20, seed=3) for _ in range(2))
    assert first.schedule == second.schedule and first.tried == second.tried
