"""A scaling law of runs or of a table: fitted, its numbers with intervals, and what it says of each model."""

import dataclasses
import math
from collections.abc import Sequence

from turnout.errors import UsageError, word
from turnout.measure.scaling import ScalingPoint
from turnout.solve.scaling import Law, ScalingLaw, fit_scaling
from turnout.types import Report

__all__ = ["law_of"]


def law_of(
    points: Sequence[ScalingPoint],
    *,
    law: Law = "saturating",
    ask: Sequence[tuple[float, float]] = (),
    extrapolate: bool = False,
    draws: int = 200,
    seed: int = 0,
) -> Report:
    """Fits the law, and the two simpler ones beside it.

    Args:
        points: as ``turnout.measure.scaling`` gives them.
        law: of ``fit_scaling``.
        ask: N and E of models that are not there.
        extrapolate: whether those may be outside the points.
        draws: of the intervals.
        seed: of the starts and draws.

    Returns:
        ``law`` and its ``numbers``, each with an ``interval``; ``rmse`` of log10 of the loss, also of the simpler laws
        (``rmse_of``); ``points`` with the loss that the law says, and the ``effective`` parameters; ``asked``.

    Raises:
        DataError: as ``fit_scaling``.
        UsageError: a model outside the points.

    Source: Clark et al., 2022, "Unified Scaling Laws for Routed Language Models".
    """
    rows = [(one.params, one.experts, one.loss) for one in points]
    columns = [[row[number] for row in rows] for number in range(3)]
    found = fit_scaling(*columns, law=law, draws=draws, seed=seed)
    simpler: dict[Law, tuple[Law, ...]] = {"saturating": ("bilinear", "separable"), "bilinear": ("separable",)}
    return Report(
        "laws",
        {
            "law": law,
            "numbers": {name: _finite(getattr(found, name)) for name in ("a", "b", "c", "d", "start", "most")},
            "interval": {name: [_finite(end) for end in ends] for name, ends in found.interval.items()},
            "cutoff": _finite(found.cutoff),
            "rmse": found.rmse,
            "rmse_of": {
                other: fit_scaling(*columns, law=other, draws=0, seed=seed).rmse for other in simpler.get(law, ())
            },
            "points": [_row(found, one) for one in points],
            "asked": [_asked(found, *one, extrapolate=extrapolate) for one in ask],
        },
        found.notes,
    )


def _row(found: ScalingLaw, one: ScalingPoint) -> dict[str, object]:
    said = found.loss(one.params, one.experts, extrapolate=True)
    return {**dataclasses.asdict(one), "said": said, "effective": _effective(found, one.params, one.experts)}


def _asked(found: ScalingLaw, params: float, experts: float, *, extrapolate: bool) -> dict[str, object]:
    far = found.outside(params, experts)
    if far and not extrapolate:
        got, fix = f"{params:g},{experts:g}, {far:.2f} decades outside", "pass --extrapolate to see it all the same"
        allowed = "be between the models that the law is fitted to"
        raise UsageError(word("--ask", got=got, allowed=allowed, where="turnout laws", fix=fix))
    said, size = found.loss(params, experts, extrapolate=True), _effective(found, params, experts)
    return {"params": params, "experts": experts, "said": said, "effective": size, "outside": far}


def _effective(found: ScalingLaw, params: float, experts: float) -> float | None:
    return _finite(found.effective(params, experts, extrapolate=True))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
