"""Claim: losses that follow the law of routed models give its numbers back, and need its interaction."""

import numpy as np

from turnout.claims.claim import Claim, Row, Values
from turnout.solve.scaling import fit_scaling

_SIZES, _NOISE = (15e6, 55e6, 130e6, 370e6, 1.3e9), 0.002
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# The paper's numbers for S-BASE: a, b, c, d, E_start, E_max.
_LAW = (-0.082, -0.108, 0.009, 1.104, 1.847, 314.478)


def routed_laws() -> Claim:
    """How far the fitted numbers are from those that made the losses, and the error with and without interaction.

    >>> routed_laws().off
    'no interaction of size and experts'

    Source: Clark et al., 2022, "Unified Scaling Laws for Routed Language Models", table 3 and figure 4.
    """
    return Claim(
        name="routed_laws",
        statement="From losses of 50 models that follow the law with its published numbers all six come back; with "
        "noise, a law without interaction of size and experts fits worse.",
        source="Clark et al., 2022, Unified Scaling Laws",
        off="no interaction of size and experts",
        switched={"numbers": "numbers, separable", "rmse": "rmse, separable"},
        rows=(
            Row(
                "largest relative error of a, b, c, d", "within", "numbers", "numbers, separable", "c is 0", bound=1e-3
            ),
            Row("error of log10 of the loss, with noise", "below", "rmse", "rmse, separable", "c is 0"),
            Row("error of log10 of the loss, with noise", "below", "rmse", "rmse, bilinear", "no ends", headline=True),
        ),
        measure=_measure,
        seconds=5,
        note=f"{len(_SIZES)} sizes, 1 to 512 experts; noise of {_NOISE} in log10. Losses are made, no model is trained",
        simulated=True,
    )


def _measure(seed: int) -> Values:
    params_M, experts_M = (one.ravel() for one in np.meshgrid(_SIZES, _COUNTS))
    flat_M = 1 / (1 / (experts_M - 1 + 1 / (1 / _LAW[4] - 1 / _LAW[5])) + 1 / _LAW[5])
    x_M, y_M = np.log10(params_M), np.log10(flat_M)
    log_M = _LAW[0] * x_M + _LAW[1] * y_M + _LAW[2] * x_M * y_M + _LAW[3]
    noisy_M = log_M + _NOISE * np.random.default_rng(seed).normal(size=len(log_M))
    found = {
        (law, noise): fit_scaling(params_M, experts_M, 10**loss_M, law=law, draws=0, seed=seed)
        for law in ("saturating", "bilinear", "separable")
        for noise, loss_M in ((0, log_M), (1, noisy_M))
    }
    away = {}
    for law in ("saturating", "separable"):
        one = found[law, 0]
        away[law] = max(abs(a / b - 1) for a, b in zip((one.a, one.b, one.c, one.d), _LAW[:4], strict=True))
    return {
        "numbers": away["saturating"],
        "numbers, separable": away["separable"],
        "rmse": found["saturating", 1].rmse,
        "rmse, bilinear": found["bilinear", 1].rmse,
        "rmse, separable": found["separable", 1].rmse,
    }
