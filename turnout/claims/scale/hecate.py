"""FSSDP (Hecate): copies for one iteration, chosen by the last one's load, take the straggler away."""

import numpy as np

from turnout.claims.claim import Claim, Row, Values
from turnout.decide.device.place import by_load
from turnout.decide.device.place import hecate as materialise
from turnout.types import Placement, Traffic

__all__ = ["hecate"]

_LAYERS, _EXPERTS, _DEVICES, _ITERATIONS, _EVERY = 2, 32, 8, 40, 20


def _measure(seed: int) -> Values:
    rng = np.random.default_rng(seed)
    logit_LE = rng.standard_normal((_LAYERS, _EXPERTS))
    home = Placement.contiguous([_EXPERTS] * _LAYERS, devices=_DEVICES)
    moved, last = home, None
    ratios: dict[str, list[float]] = {"sparse": [], "home": [], "rearranged": []}
    copies, full = 0.0, 0.0
    for iteration in range(_ITERATIONS):
        logit_LE = 0.9 * logit_LE + np.sqrt(1 - 0.9**2) * rng.standard_normal(logit_LE.shape)
        weight_LE = np.exp(logit_LE)
        load_LE = tuple(rng.multinomial(16_384, row / row.sum()) for row in weight_LE)
        told = Traffic(load_LE, (np.zeros((_EXPERTS, _EXPERTS)),) * (_LAYERS - 1))
        if last is not None:
            if iteration % _EVERY == 1:
                moved = by_load(last, devices=_DEVICES)
            found = materialise(home, last, spare=4, expert_bytes=1.0)
            for name, placement in (("sparse", found.placement), ("home", home), ("rearranged", moved)):
                ratios[name].append(told.imbalance(placement))
            copies, full = copies + found.bytes, full + _LAYERS * _EXPERTS * (_DEVICES - 1)
        last = load_LE
    return {**{name: float(np.mean(values)) - 1 for name, values in ratios.items()}, "bytes": copies / full, "all": 1.0}


def hecate() -> Claim:
    """Sparse materialisation by the last iteration's load, against the experts at home and now and then rearranged.

    >>> hecate().name
    'hecate'

    Source: Qing et al., 2025, "Hecate: Unlocking Efficient Sparse Model Training via Fully Sharded Sparse Data
    Parallelism".
    """
    return Claim(
        name="hecate",
        statement="a few copies of busy experts, made anew in each iteration, keep devices evenly busy under loads "
        "that change from iteration to iteration",
        source='Qing et al., 2025, "Hecate: ... Fully Sharded Sparse Data Parallelism"',
        off="each expert at home alone; all parameters gathered everywhere, for the bytes",
        switched={"sparse": "home", "bytes": "all"},
        rows=(
            Row("busiest device above the mean", "below", "sparse", "home", "no copies"),
            Row("bytes gathered, over gathering all experts everywhere", "below", "bytes", "all", "FSDP"),
            Row("busiest device above the mean, against rearranging", "below", "sparse", "rearranged",
                "experts moved by load every 20 iterations", headline=True),
        ),
        measure=_measure,
        seconds=3,
        note="straggler {home} above the mean without copies, {sparse} with; {bytes} of the bytes of a full gather. "
        "Times are not measured; the paper's 3.54x is of its cluster",
        simulated=True,
    )  # fmt: skip
