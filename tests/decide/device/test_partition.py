"""Partition: the best of all cuts where these can be counted, and better than balance where balance misleads."""

import itertools
import random

import pytest

from turnout.decide import device
from turnout.decide.device.partition import merged
from turnout.errors import UsageError
from turnout.solve import pipeline
from turnout.types import Schedule, StageCosts


def network(work: list[float]) -> StageCosts:
    return StageCosts(tuple(work), tuple(work), tuple(work))


def utilization(blocks: StageCosts, schedule: Schedule, time: float) -> float:
    work = sum(map(sum, (blocks.forward_S, blocks.input_S, blocks.weight_S)))
    return work * schedule.microbatches / schedule.ranks / time


@pytest.mark.parametrize("seed", range(20))
def test_the_best_of_all_cuts_of_eight_blocks(seed: int) -> None:
    rng = random.Random(seed)
    blocks = StageCosts(*(tuple(rng.uniform(0.3, 2.0) for _ in range(8)) for _ in "FIW"), send=rng.choice((0.0, 0.3)))
    schedule = rng.choice((device.one_f_one_b, device.zb_h1, device.gpipe))(3, 5)
    cuts = [(i, j - i, 8 - j) for i, j in itertools.combinations(range(1, 8), 2)]
    best = min(pipeline(schedule, merged(blocks, cut)).makespan for cut in cuts)
    found = device.partition(blocks, schedule)
    assert sum(found.blocks_S) == 8 and found.time <= min(found.even_time, found.min_max_time) + 1e-12
    assert found.time == pytest.approx(pipeline(schedule, found.costs).makespan, abs=1e-12)
    assert found.time <= 1.02 * best, (found.blocks_S, best)


@pytest.mark.parametrize(
    ("make", "balanced"), [(device.one_f_one_b, 0.688), (device.interleaved, 0.824), (device.zbv, 0.914)]
)
def test_sixty_one_layers_on_eight_devices(make, balanced: float) -> None:
    """A head as long as 1.6 layers; what devices do with their time, m = 16."""
    blocks = network([1.0] * 60 + [2.6])
    schedule = make(8, 16)
    found = device.partition(blocks, schedule)
    even, min_max, best = (utilization(blocks, schedule, t) for t in (found.even_time, found.min_max_time, found.time))
    assert min_max == pytest.approx(balanced, abs=2e-3)
    assert even < min_max <= best + 1e-12


def test_balance_is_not_the_aim() -> None:
    """With few microbatches the largest stage is not what a step takes."""
    rng = random.Random(0)
    gains = []
    for _ in range(10):
        blocks = network([rng.uniform(0.3, 2.0) for _ in range(10)])
        found = device.partition(blocks, device.interleaved(2, 4))
        gains.append(found.min_max_time / found.time)
    assert max(gains) > 1.02 and min(gains) >= 1.0


def test_a_limit_of_memory_moves_blocks() -> None:
    blocks = StageCosts((1.0,) * 6, (1.0,) * 6, (1.0,) * 6)
    schedule = device.one_f_one_b(2, 6)  # the first device holds two microbatches, the second one
    assert device.partition(blocks, schedule).blocks_S == (3, 3)
    tight = device.partition(blocks, schedule, memory=4.0)
    assert tight.blocks_S == (2, 4) and pipeline(schedule, tight.costs).peak_R.max() <= 4.0
    with pytest.raises(UsageError, match="memory"):
        device.partition(blocks, schedule, memory=1.0)


def test_fewer_blocks_than_stages_are_refused() -> None:
    with pytest.raises(UsageError, match="at most 3 stages"):
        device.partition(network([1.0] * 3), device.gpipe(4, 4))
