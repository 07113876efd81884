"""V-Half and V-Min: about half and a third of 1F1B's memory, at a half and two thirds of its bubble."""

import pytest

from turnout.decide import device
from turnout.solve import pipeline
from turnout.types import StageCosts


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_memory_and_bubble_are_as_published(p: int) -> None:
    m, costs = 4 * p, StageCosts.even(2 * p, activation=0.5)
    flat = (p - 1) / (m + p - 1)
    half, least = (pipeline(make(p, m), costs) for make in (device.v_half, device.v_min))
    # 1F1B holds p; what is left beyond a half and a third are a few stages' microbatches, whatever p.
    assert half.peak_R.max() <= p / 2 + 1 and least.peak_R.max() <= p / 3 + 1
    if p >= 4:
        assert half.span_bubble <= 0.6 * flat and least.span_bubble <= 0.75 * flat
    assert half.span_bubble <= least.span_bubble + 1e-9
