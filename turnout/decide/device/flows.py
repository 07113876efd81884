"""Ethereal: the flows of a collective, each on one path, a few of them split; no path is busier than if all sprayed."""

import dataclasses
import math

import numpy as np

from turnout.errors import UsageError, word

__all__ = ["Flows", "ecmp", "flows"]

_WHERE = "turnout.decide.device.flows"


@dataclasses.dataclass(frozen=True)
class Flows:
    """Which path each part of a flow takes.

    Args:
        parts: (flow, path, share of the flow) of each part.
        flows: n.
        paths: s.

    >>> Flows(((0, 0, 1.0), (1, 0, 1.0)), flows=2, paths=2).congestion
    2.0

    Source: none; plain bookkeeping.
    """

    parts: tuple[tuple[int, int, float], ...]
    flows: int
    paths: int

    @property
    def load_S(self) -> np.ndarray:
        """(S,) flows on each path."""
        path, share = np.array([part[1] for part in self.parts]), np.array([part[2] for part in self.parts])
        return np.bincount(path, share, minlength=self.paths)

    @property
    def congestion(self) -> float:
        """The busiest path, over what each has if every packet goes another way; 1 is as even as can be."""
        return float(self.load_S.max() * self.paths / self.flows)

    @property
    def extra(self) -> float:
        """Parts beyond one a flow, over the flows: more connections to keep."""
        return len(self.parts) / self.flows - 1


def flows(count: int, paths: int) -> Flows:
    """N equal flows on s paths, each on one path, save n mod s that are split into s / gcd(n mod s, s) equal parts.

    Args:
        count: n, flows of one size that start together.
        paths: s, disjoint and of one rate.

    Returns:
        The parts; every path carries exactly n / s flows. No flow is split where s divides n: sizes of rings and
        all-to-alls for which it does are the ones to choose.

    Raises:
        UsageError: fewer than one flow or path.

    >>> found = flows(16, 24)
    >>> found.congestion, round(found.extra, 2), flows(32, 8).extra
    (1.0, 2.0, 0.0)

    Source: Addanki et al., 2024, "Challenging the Need for Packet Spraying in Large-Scale Distributed Training".
    """
    _check(count, paths)
    whole = count - count % paths
    parts = [(flow, flow % paths, 1.0) for flow in range(whole)]
    if rest := count % paths:
        pieces = paths // math.gcd(rest, paths)
        for number in range(rest * pieces):
            parts.append((whole + number // pieces, number % paths, 1 / pieces))
    return Flows(tuple(parts), count, paths)


def ecmp(count: int, paths: int, *, seed: int = 0) -> Flows:
    """The same flows, each whole on a path drawn at random, as switches that hash a flow's header do.

    Args:
        count: n.
        paths: s.
        seed: of the draw.

    Returns:
        The parts, one a flow.

    Raises:
        UsageError: fewer than one flow or path.

    >>> ecmp(8, 8).congestion > 1
    True

    Source: Hopps, 2000, "Analysis of an Equal-Cost Multi-Path Algorithm", RFC 2992.
    """
    _check(count, paths)
    path_N = np.random.default_rng(seed).integers(0, paths, count).tolist()
    return Flows(tuple((flow, path, 1.0) for flow, path in enumerate(path_N)), count, paths)


def _check(count: int, paths: int) -> None:
    for name, value in (("count", count), ("paths", paths)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(word(name, got=value, allowed="be at least 1", where=_WHERE, fix=f"pass {name}=8"))
