"""Scaling laws of routed models: the loss of N parameters with E experts, fitted, with what is known of its numbers."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from scipy.optimize import least_squares, linprog

from turnout.errors import DataError, UsageError, word

__all__ = ["ScalingLaw", "fit_scaling"]

Law = Literal["saturating", "bilinear", "separable"]
_WHERE = "turnout.solve.fit_scaling"
# Per law, the numbers that are free: of a, b, c, d, log2 of E_start, log2 of E_max.
_FREE = {"saturating": 6, "bilinear": 4, "separable": 3}
_FIRST = np.array([-0.08, -0.1, 0.01, 1.1, 1.0, 9.0])
_LOW = np.array([-1.0, -1.0, -0.2, -5.0, 0.01, 3.0])
_HIGH = np.array([0.1, 0.5, 0.2, 5.0, 2.9, 14.0])
_NAMES = ("a", "b", "c", "d", "start", "most")


@dataclasses.dataclass(frozen=True, eq=False)
class ScalingLaw:
    """log L = a log N + b log e + c log N log e + d, logs to base 10, e(E) between ``start`` at E = 1 and ``most``.

    Args:
        law: which of the numbers were free; without saturation e is E, in a separable law c is 0.
        a: of N.
        b: of e.
        c: of their product; above 0, experts help larger models less.
        d: what is left.
        start: e of a dense model.
        most: e of infinitely many experts; infinite where there is no saturation.
        rmse: of log L, over the points.
        point_M2: (M, 2) log N and log E of the points.
        interval: 95 % of each number that is free, by points drawn anew.
        notes: what of it should not be relied on.

    >>> law = ScalingLaw("separable", -0.1, -0.05, 0.0, 1.0, 1.0, math.inf, 0.0, np.log10([[1e6, 1], [1e6, 8]]), {})
    >>> round(law.loss(1e6, 4), 3), round(law.effective(1e6, 4))
    (2.344, 2000000)

    Source: Clark et al., 2022, "Unified Scaling Laws for Routed Language Models", equation 7.
    """

    law: Law
    a: float
    b: float
    c: float
    d: float
    start: float
    most: float
    rmse: float
    point_M2: np.ndarray
    interval: dict[str, tuple[float, float]]
    notes: tuple[str, ...] = ()

    def loss(self, params: float, experts: float, *, extrapolate: bool = False) -> float:
        """The loss of so many parameters with so many experts.

        Args:
            params: N, that a token meets, without embeddings.
            experts: E, 1 for a dense model.
            extrapolate: whether it may be asked outside the points.

        Raises:
            UsageError: outside the convex hull of the points' log N and log E, unless ``extrapolate``.
        """
        self._inside(params, experts, extrapolate)
        row_6 = np.array([self.a, self.b, self.c, self.d, *np.log2([self.start, self.most])])
        return float(10 ** _log_loss(row_6, np.array([params]), np.array([experts]))[0])

    def effective(self, params: float, experts: float, *, extrapolate: bool = False) -> float:
        """The parameters of the dense model that has the loss of this one.

        Raises:
            UsageError: as ``loss``.
        """
        self._inside(params, experts, extrapolate)
        here = float(_saturated(np.array([float(experts)]), *np.log2([self.start, self.most]))[0])
        slope, dense = (self.a + self.c * math.log10(one) for one in (here, self.start))
        return float(params ** (slope / dense) * (here / self.start) ** (self.b / dense))

    @property
    def cutoff(self) -> float:
        """The parameters beyond which more experts do not help, by this law; infinite where they always do."""
        return 10 ** min(-self.b / self.c, 300.0) if self.c > 0 and self.b < 0 else math.inf

    def outside(self, params: float, experts: float) -> float:
        """How far outside the points this is, in decades: the longer of the two axes, 0 within their convex hull."""
        if not (0 < params < math.inf and 1 <= experts < math.inf):
            got = f"{params} and {experts}"
            fix = "pass such as 1e6 and 8"
            where, allowed = "turnout.solve.ScalingLaw", "be above 0 and at least 1"
            raise UsageError(word("params and experts", got=got, allowed=allowed, where=where, fix=fix))
        here_2, count = np.log10([params, experts]), len(self.point_M2)
        # The nearest point of the hull by the largest of the two distances: weights w of the points, and that distance.
        rise = np.vstack([self.point_M2.T, -self.point_M2.T])
        near = np.hstack([rise, -np.ones((4, 1))])
        ones = np.append(np.ones(count), 0.0)[None]
        found = linprog(np.append(np.zeros(count), 1.0), near, np.append(here_2, -here_2), ones, [1.0])
        return 0.0 if found.fun < 1e-9 else float(found.fun)

    def _inside(self, params: float, experts: float, extrapolate: bool) -> None:
        if (far := self.outside(params, experts)) and not extrapolate:
            got, fix = (
                f"{params:.4g} and {experts:g}, {far:.2f} decades outside",
                "pass extrapolate=True to see it all the same",
            )
            low, high = 10 ** self.point_M2.min(0), 10 ** self.point_M2.max(0)
            allowed = (
                f"be among the points: {low[0]:.4g} to {high[0]:.4g} parameters, {low[1]:g} to {high[1]:g} experts"
            )
            where = "turnout.solve.ScalingLaw"
            raise UsageError(word("params and experts", got=got, allowed=allowed, where=where, fix=fix))


def fit_scaling(
    params_M: Sequence[float] | np.ndarray,
    experts_M: Sequence[float] | np.ndarray,
    loss_M: Sequence[float] | np.ndarray,
    *,
    law: Law = "saturating",
    draws: int = 200,
    seed: int = 0,
) -> ScalingLaw:
    """The law with the least squared error of log L.

    Args:
        params_M: (M,) N, the parameters that a token meets, without embeddings, all above 0.
        experts_M: (M,) E, 1 for dense models.
        loss_M: (M,) losses of as many steps, all above 0; in nats or bits.
        law: "saturating", six numbers; "bilinear", four, e = E; or "separable", three, and c = 0.
        draws: how often the points are drawn anew for the intervals; 0 for none.
        seed: of the starts and of those draws.

    Returns:
        The law. It is fitted from twelve starts; numbers that end at a bound, or of which nearly nothing is known, are
        named in its notes.

    Raises:
        DataError: arrays of different lengths or with numbers out of range, or fewer points than the law has numbers,
            one model size, or one number of experts.
        UsageError: law is none of the three.

    >>> sizes, counts = np.meshgrid([1e6, 1e7, 1e8], [1, 2, 4, 8])
    >>> losses = 10 ** (1.1 - 0.08 * np.log10(sizes) - 0.03 * np.log10(counts))
    >>> found = fit_scaling(sizes.ravel(), counts.ravel(), losses.ravel(), law="separable", draws=0)
    >>> round(found.a, 4), round(found.b, 4), round(found.effective(1e7, 4) / 1e7, 3)
    (-0.08, -0.03, 1.682)

    Source: Clark et al., 2022, "Unified Scaling Laws for Routed Language Models", sections 3 and 5. Their fit takes 500
    starts of normal noise, of which half have the wrong signs.
    """
    if law not in _FREE:
        got, fix = repr(law), "pass law='saturating'"
        raise UsageError(word("law", got=got, allowed=f"be one of {', '.join(_FREE)}", where=_WHERE, fix=fix))
    rows = [np.asarray(one, dtype=np.float64) for one in (params_M, experts_M, loss_M)]
    _check(rows, law)
    chance = np.random.default_rng(seed)
    starts = [_FIRST, *(_FIRST * (1 + 0.3 * chance.normal(size=(11, 6))))]
    best_6 = min((_fitted(rows, law, start_6) for start_6 in starts), key=lambda row_6: _rmse(row_6, rows))
    drawn = []
    for _ in range(draws):
        pick_M = chance.integers(len(rows[0]), size=len(rows[0]))
        some = [one[pick_M] for one in rows]
        if len(set(some[0])) > 1 and len(set(some[1])) > 1:
            drawn.append(_fitted(some, law, best_6))
    return _law(law, best_6, rows, drawn)


def _law(law: Law, best_6: np.ndarray, rows: Sequence[np.ndarray], drawn: Sequence[np.ndarray]) -> ScalingLaw:
    found, spread = _plain(best_6), dict[str, tuple[float, float]]()
    if drawn:
        seen = np.stack([_plain(row_6) for row_6 in drawn])
        for number in _free(law):
            low, high = np.quantile(seen[:, number], (0.025, 0.975))
            spread[_NAMES[number]] = (float(low), float(high))
    notes = list[str]()
    free = [number in _free(law) for number in range(6)]
    ends = (best_6 <= _LOW + 1e-3) | (best_6 >= _HIGH - 1e-3)
    for number, name in enumerate(_NAMES):
        if free[number] and ends[number]:
            notes.append(f"{name} ended at the end of its range, {found[number]:.4g}: these points do not say it.")
        elif number > 3 and free[number] and name in spread and spread[name][1] > 4 * spread[name][0]:
            notes.append(
                f"{name} is hardly known: {spread[name][0]:.3g} to {spread[name][1]:.3g} in 95 % of the draws."
            )
    point_M2 = np.log10(np.stack(rows[:2], 1))
    a, b, c, d, start, most = map(float, found)
    return ScalingLaw(law, a, b, c, d, start, most, _rmse(best_6, rows), point_M2, spread, tuple(notes))


def _free(law: Law) -> tuple[int, ...]:
    return {"saturating": (0, 1, 2, 3, 4, 5), "bilinear": (0, 1, 2, 3), "separable": (0, 1, 3)}[law]


def _plain(row_6: np.ndarray) -> np.ndarray:
    return np.append(row_6[:4], 2.0 ** row_6[4:])


def _saturated(experts_M: np.ndarray, start: float, most: float) -> np.ndarray:
    """e(E); start and most are logs to base 2, and 0 and infinity leave E as it is."""
    least, top = 2.0**start, 2.0**most
    return 1 / (1 / (experts_M - 1 + 1 / (1 / least - 1 / top)) + 1 / top)


def _log_loss(row_6: np.ndarray, params_M: np.ndarray, experts_M: np.ndarray) -> np.ndarray:
    size_M, effect_M = np.log10(params_M), np.log10(_saturated(experts_M, row_6[4], row_6[5]))
    return row_6[0] * size_M + row_6[1] * effect_M + row_6[2] * size_M * effect_M + row_6[3]


def _rmse(row_6: np.ndarray, rows: Sequence[np.ndarray]) -> float:
    return float(np.sqrt(np.square(_log_loss(row_6, rows[0], rows[1]) - np.log10(rows[2])).mean()))


def _fitted(rows: Sequence[np.ndarray], law: Law, start_6: np.ndarray) -> np.ndarray:
    free, whole_6 = list(_free(law)), np.array([0.0, 0.0, 0.0, 0.0, 0.0, np.inf])
    target_M = np.log10(rows[2])

    def left(some: np.ndarray) -> np.ndarray:
        whole_6[free] = some
        return _log_loss(whole_6, rows[0], rows[1]) - target_M

    first = np.clip(np.where(np.isfinite(start_6), start_6, _FIRST), _LOW + 1e-3, _HIGH - 1e-3)[free]
    scale = np.maximum(np.abs(_FIRST[free]), 1e-2)
    done = least_squares(
        left, first, bounds=(_LOW[free], _HIGH[free]), x_scale=scale, xtol=1e-13, ftol=1e-13, gtol=1e-13
    )
    whole_6[free] = done.x
    return whole_6.copy()


def _check(rows: Sequence[np.ndarray], law: Law) -> None:
    params_M, experts_M, loss_M = rows
    where = _WHERE
    if len({one.shape for one in rows}) != 1 or params_M.ndim != 1:
        got, fix = " and ".join(str(one.shape) for one in rows), "pass one number of each for every model"
        raise DataError(word("the points", got=got, allowed="have one length", where=where, fix=fix))
    if (
        not all(np.isfinite(one).all() for one in rows)
        or (min(*params_M, *loss_M, 1.0) <= 0)
        or min(*experts_M, 1.0) < 1
    ):
        got, fix = "others", "leave out runs that failed; a dense model has 1 expert"
        allowed = "be finite, parameters and losses above 0, experts 1 or more"
        raise DataError(word("the points", got=got, allowed=allowed, where=where, fix=fix))
    need = _FREE[law] + 1
    sizes, counts = len(set(params_M)), len(set(experts_M))
    least = 4 if law == "saturating" else 2
    if len(params_M) < need or sizes < 2 or counts < least:
        got = f"{len(params_M)} models of {sizes} sizes and {counts} numbers of experts"
        allowed = f"be at least {need} for a {law} law, of 2 sizes and {least} numbers of experts"
        raise DataError(
            word("the points", got=got, allowed=allowed, where=where, fix="add runs, or pass law='separable'")
        )
