"""SurCo: linear costs learned through an exact solver, for a placement whose cost is not linear."""

import numpy as np
import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.scale.walks import walks
from turnout.decide.device.place import by_affinity, by_load, latency
from turnout.decide.device.place import surco as learned
from turnout.types import Placement

__all__ = ["surco"]

_LAYERS, _EXPERTS, _DEVICES, _STEPS, _TOKENS = 4, 16, 4, 40, 8000


def _measure(seed: int) -> Values:
    told, even = walks(_LAYERS, _EXPERTS, seed, alpha=0.3, tokens=_TOKENS), _TOKENS / _DEVICES
    measured = ((0.0, 0.2), (0.8 * even, 0.4), (1.2 * even, 1.0), (2 * even, 3.0))
    cost = latency(told, measured=measured, wire=0.6 / even)
    guide = latency(told, measured=measured, wire=0.6 / even, norm=4)

    def seconds(placement: Placement) -> float:
        held_LGE = np.stack([placement.held(layer) for layer in range(_LAYERS)]).astype(float)
        return float(cost(torch.tensor(held_LGE)))

    start = Placement.contiguous([_EXPERTS] * _LAYERS, devices=_DEVICES)
    rng, seat_E, one_GG = np.random.default_rng(seed), np.arange(_EXPERTS) % _DEVICES, np.eye(_DEVICES, dtype=bool)
    drawn = (Placement.of([one_GG[:, rng.permutation(seat_E)] for _ in range(_LAYERS)]) for _ in range(2 * _STEPS))
    return {
        "learned": seconds(learned(cost, start, guide=guide, steps=_STEPS)),
        "as it starts": seconds(start),
        "drawn": min(map(seconds, drawn)),
        "affinity": seconds(by_affinity(told.step_LEE, devices=_DEVICES, kicks=40)),
        "load": seconds(by_load(told.load_LE, devices=_DEVICES)),
    }


def surco() -> Claim:
    """Learned linear costs against the same start without learning, draws, and a solver of another, linear cost.

    >>> surco().name
    'surco'

    Source: Ferber et al., 2023, "SurCo: Learning Linear Surrogates for Combinatorial Nonlinear Optimization Problems".
    """
    return Claim(
        name="surco",
        statement="linear costs learned through an exact solver lead to better choices under a non-linear cost",
        source='Ferber et al., 2023, "SurCo"',
        off="the linear costs as they start, without learning",
        switched={"learned": "as it starts"},
        rows=(
            Row("latency of a placement", "below", "learned", "as it starts", "no learning"),
            Row("latency of a placement, against draws", "below", "learned", "drawn",
                "the best of as many random placements"),
            Row("latency of a placement, against a linear aim", "below", "learned", "affinity",
                "the solver's best for crossing steps alone", headline=True),
            Row("latency of a placement, against who knows the domain", "below", "learned", "load",
                "a search for even load", headline=True),
        ),
        measure=_measure,
        seconds=4,
        note="latency {learned} against {as it starts}; a table of seconds with a bend and maxima over devices, not a "
        "cluster. The paper holds learned costs against a domain's own approaches; here that is a search by load",
        limits=(0.0, 40.0),
        simulated=True,
    )  # fmt: skip
