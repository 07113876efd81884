"""Pipeline schedules are torch's own, take what the papers' formulas and tables say, and hold what they may."""

import random

import pytest
from private import private

from turnout.decide import device
from turnout.errors import UsageError
from turnout.measure import simulate
from turnout.solve import pipeline
from turnout.types import Schedule, StageCosts

EXACT = 1e-9
FEW = [(p, m) for p in (1, 2, 3, 4) for m in (1, 2, 3, 6, 8)] + [(8, 16)]
# Qi et al., 2024: ms of F, I, W and a message; p, and the m that they ran.
PROFILES = {
    "1.5B": (8, (18.522, 18.086, 9.337, 0.601), (24, 32, 64)),
    "6.2B": (8, (29.718, 29.444, 19.927, 0.527), (24, 32, 64)),
    "14.6B": (16, (11.347, 11.248, 8.132, 0.377), (48, 64, 128)),
    "28.3B": (32, (10.419, 10.207, 7.715, 0.408), (96, 128, 256)),
}
# model, m -> bubble rate of 1F1B, interleaved (v = 2), ZB-H1 (and ZB-1p), ZB-2p, ZBV: the authors' own programs.
RATES = {
    ("1.5B", 24): (0.2431, 0.1396, 0.1585, 0.0433, 0.0728),
    ("1.5B", 32): (0.1978, 0.1084, 0.1238, 0.0036, 0.0556),
    ("1.5B", 64): (0.1187, 0.0573, 0.0660, 0.0018, 0.0286),
    ("6.2B", 24): (0.2347, 0.1336, 0.1323, 0.0029, 0.0446),
    ("14.6B", 48): (0.2552, 0.1468, 0.1397, 0.0066, 0.0518),
    ("28.3B", 96): (0.2646, 0.1528, 0.1421, 0.0038, 0.0541),
}


def profile(model: str) -> tuple[int, StageCosts]:
    p, (forward, input, weight, send), _ = PROFILES[model]
    return p, StageCosts.even(p, forward=forward, input=input, weight=weight, send=send)


def torchs(name: str, p: int, m: int, chunks: int | None = None) -> str:
    """Torch's own order in its text form, without what only says when gradients are reduced."""
    visualizer = private("torch.distributed.pipelining._schedule_visualizer")
    orders = visualizer.get_schedule_ops(name, p, m, chunks)
    kept = [[str(a) for a in order if a is not None and "REDUCE_GRAD" not in str(a)] for order in orders]
    return "".join(",".join(order) + "\n" for order in kept)


@pytest.mark.parametrize(("p", "m"), FEW)
def test_the_orders_are_torchs(p: int, m: int) -> None:
    assert device.gpipe(p, m).to_csv() == torchs("GPipe", p, m)
    assert device.zbv(p, m).to_csv() == torchs("ZBVZeroBubble", p, m)
    for chunks in (2, 3):
        assert device.looped_breadth_first(p, m, chunks=chunks).to_csv() == torchs("LoopedBFS", p, m, chunks)
        if m % max(1, m // p) == 0:
            assert device.interleaved(p, m, chunks=chunks).to_csv() == torchs("Interleaved1F1B", p, m, chunks)
            mine = device.interleaved_zero_bubble(p, m, chunks=chunks)
            assert mine.to_csv() == torchs("InterleavedZeroBubble", p, m, chunks)
    if m >= 2 * p:
        assert device.dual_pipe_v(p, m).to_csv() == torchs("DualPipeV", p, m)


@pytest.mark.parametrize("p", range(1, 17))
def test_closed_forms(p: int) -> None:
    """To 1e-9, for random times; those that the formulas are for."""
    rng = random.Random(p)
    for _ in range(2):
        f, i, w = (rng.uniform(0.1, 1) for _ in range(3))
        m, chunks = rng.randint(p, 2 * p), rng.randint(2, 3)
        even = StageCosts.even(p, forward=f, input=i, weight=w)
        for schedule in (device.gpipe(p, m), device.one_f_one_b(p, m)):
            times = pipeline(schedule, even)
            assert times.makespan == pytest.approx((m + p - 1) * (f + i + w), abs=EXACT)
            assert times.bubble == pytest.approx((p - 1) / (m + p - 1), abs=EXACT)
        m = p * rng.randint(1, 2)
        finer = StageCosts.even(p * chunks, forward=f, input=i, weight=w)
        for schedule in (device.interleaved(p, m, chunks=chunks), device.looped_breadth_first(p, m, chunks=chunks)):
            times = pipeline(schedule, finer)
            assert times.makespan == pytest.approx((chunks * m + p - 1) * (f + i + w), abs=EXACT)
            assert times.bubble == pytest.approx((p - 1) / (chunks * m + p - 1), abs=EXACT)
        f, i = rng.uniform(0.5, 1), rng.uniform(0.5, 1)
        w = rng.uniform(0.1, min(f, i))  # a longer one does not fit into the gaps
        m = rng.randint(p, 2 * p)
        times = pipeline(device.zb_h1(p, m), StageCosts.even(p, forward=f, input=i, weight=w))
        assert times.makespan == pytest.approx(m * (f + i + w) + (p - 1) * (f + i - w), abs=EXACT)
        m, equal = rng.randint(2 * p, 3 * p), StageCosts.even(2 * p, forward=f, input=f, weight=f)
        times = pipeline(device.dual_pipe_v(p, m), equal)
        assert times.makespan == pytest.approx(6 * m * f + (p - 1) * (3 * f + 2 * f - 3 * f), abs=EXACT)
        times = pipeline(device.zbv(p, m), equal)
        assert times.span == pytest.approx(6 * m * f, abs=EXACT)
        times = pipeline(device.zb_h2(p, m), StageCosts.even(p, forward=f, input=f, weight=f))
        assert times.span == pytest.approx(3 * m * f, abs=EXACT)
        assert times.makespan == pytest.approx((3 * m + p - 1) * f, abs=EXACT)  # the barrier's share


@pytest.mark.parametrize(
    ("model", "m"), [pytest.param(*key, marks=[pytest.mark.slow] if key[1] > 64 else []) for key in RATES]
)
def test_the_papers_profiles(model: str, m: int) -> None:
    p, costs = profile(model)
    half = StageCosts.cut(costs, 2)
    flat, looped, h1, two_p, v = RATES[model, m]

    def rate(schedule: Schedule, at: StageCosts) -> float:
        return simulate(schedule, at)["span_bubble"]

    assert rate(device.one_f_one_b(p, m), costs) == pytest.approx(flat, abs=5e-5)
    assert rate(device.interleaved(p, m), half) == pytest.approx(looped, abs=5e-5)
    assert rate(device.zb_h1(p, m), costs) == pytest.approx(h1, abs=5e-5)
    assert rate(device.zbv(p, m), half) == pytest.approx(v, abs=5e-5)
    assert rate(device.zb_automatic(costs, m), costs) == pytest.approx(h1, abs=5e-5)
    assert rate(device.zb_automatic(costs, m, memory=2 * p), costs) == pytest.approx(two_p, abs=5e-5)


@pytest.mark.parametrize(("p", "m"), [(4, 8), (8, 24)])
def test_what_devices_hold(p: int, m: int) -> None:
    even, half = StageCosts.even(p), StageCosts.cut(StageCosts.even(p), 2)
    assert simulate(device.gpipe(p, m), even)["peak_by_rank"] == [m] * p
    assert simulate(device.one_f_one_b(p, m), even)["peak_by_rank"] == list(range(p, 0, -1))
    assert simulate(device.zb_h1(p, m), even)["peak"] == p
    assert simulate(device.zb_h2(p, m), even)["peak"] == 2 * p - 1
    assert simulate(device.zbv(p, m), half)["peak"] == p
    for memory in (p, p + 2.5, 2 * p):
        assert simulate(device.zb_automatic(even, m, memory=memory), even)["peak"] <= memory + 1e-9


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match=r"ranks must be a whole number.*got 0"):
        device.gpipe(0, 4)
    with pytest.raises(UsageError, match="pass microbatches=4"):
        device.interleaved(2, 5)
    with pytest.raises(UsageError, match="pass microbatches=8"):
        device.dual_pipe_v(4, 7)
    with pytest.raises(UsageError, match="hold a microbatch"):
        device.zb_automatic(StageCosts.even(4), 8, memory=0.5)
    with pytest.raises(UsageError, match=r"costs of 4 stages.*StageCosts.cut"):
        pipeline(device.interleaved(4, 8), StageCosts.even(4))
