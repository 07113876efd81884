"""Ethereal: single paths with few splits are as good as spraying packets."""

import numpy as np

from turnout.claims.claim import Claim, Row, Values
from turnout.decide.device import ecmp
from turnout.decide.device import flows as split

__all__ = ["flows"]

_CASES = ((8, 8), (24, 16), (256, 32), (31, 32))  # flows, paths
_DIVIDE = tuple((count, paths) for count, paths in _CASES if count % paths == 0)


def _measure(seed: int) -> Values:
    return {
        "ethereal": max(split(count, paths).congestion for count, paths in _CASES) - 1,
        "hashed": min(ecmp(count, paths, seed=seed).congestion for count, paths in _CASES) - 1,
        "mean": float(np.mean([split(count, paths).congestion for count, paths in _CASES])),
        "mean, hashed": float(np.mean([ecmp(count, paths, seed=seed).congestion for count, paths in _CASES])),
        "split": max(split(count, paths).extra for count, paths in _DIVIDE),
        "split, sprayed": min(paths - 1.0 for _, paths in _DIVIDE),  # a part of every flow on every path
        "extra": float(np.mean([split(count, paths).extra for count, paths in _CASES])),
        "extra, sprayed": float(np.mean([paths - 1.0 for _, paths in _CASES])),
        "extra, paths divide flows": split(256, 32).extra,
        "extra, 24 flows on 16 paths": split(24, 16).extra,
        "extra, 31 flows on 32 paths": split(31, 32).extra,
    }


def flows() -> Claim:
    """One path a flow and as few splits as can be, against paths by a hash.

    >>> flows().name
    'flows'

    Source: Addanki et al., 2024, "Challenging the Need for Packet Spraying in Large-Scale Distributed Training".
    """
    return Claim(
        name="flows",
        statement="flows of a collective on one path each, few of them split, load no path more than spraying every "
        "packet would",
        source='Addanki et al., 2024, "Challenging the Need for Packet Spraying"',
        off="each flow whole on the path that a hash gives it",
        switched={"ethereal": "hashed", "mean": "mean, hashed", "split": "split, sprayed"},
        rows=(
            Row("busiest path above spraying, the worst case", "within", "ethereal", "hashed", "ECMP", bound=1e-9),
            Row("busiest path over spraying, the mean of four cases", "below", "mean", "mean, hashed", "ECMP"),
            Row("extra pieces a flow where paths divide flows", "within", "split", "split, sprayed", "spraying",
                bound=0.0),
            Row("extra pieces a flow, the mean of four cases", "below", "extra", "extra, sprayed", "spraying",
                headline=True),
        ),
        measure=_measure,
        seconds=1,
        note="extra pieces a flow: {extra, paths divide flows} where paths divide flows, {extra, 24 flows on 16 paths} "
        "for 24 on 16, {extra, 31 flows on 32 paths} for 31 on 32: choose sizes that divide",
        limits=(-1e-9, 40.0),
        simulated=True,
    )  # fmt: skip
