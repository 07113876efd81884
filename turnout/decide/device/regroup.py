"""Regrouping: which requests run together, so that a batch wakes few experts."""

import numpy as np

from turnout.errors import ShapeError, UsageError, word

__all__ = ["regroup"]

_WHERE = "turnout.decide.device.regroup"


def regroup(path_NLE: np.ndarray, *, size: int) -> tuple[tuple[int, ...], ...]:
    """Batches of requests whose experts are alike.

    A batch begins with the first request that is left and takes, until it is full, always the one that wakes fewest
    experts which are not awake yet: it adds least to sum over experts of 1 - prod over the batch of (1 - p). Which
    requests run together changes nobody's numbers where rows do not depend on their batch.

    Args:
        path_NLE: (N, L, E) the chance of each expert in each layer to be used by each request, 0 to 1; what was used in
            its last pass is a good guess.
        size: requests in a batch.

    Returns:
        The numbers of the requests of each batch, each request once; the last batch may be smaller.

    Raises:
        ShapeError: not three axes, or chances outside 0 to 1.
        UsageError: a size below 1.

    >>> path = np.eye(2)[[0, 1, 0, 1]][:, None]  # four requests, one layer, two experts
    >>> regroup(path, size=2)
    ((0, 2), (1, 3))

    Source: He et al., 2024, "ExpertFlow: Optimized Expert Activation and Token Allocation for Efficient
    Mixture-of-Experts Inference", whose token scheduler clusters routing paths.
    """
    path_NLE = np.asarray(path_NLE, np.float64)
    if path_NLE.ndim != 3 or not ((path_NLE >= 0) & (path_NLE <= 1)).all():
        got, allowed = f"shape {path_NLE.shape}", "be (N, L, E) of chances from 0 to 1"
        raise ShapeError(word("path_NLE", got=got, allowed=allowed, where=_WHERE, fix="pass used experts as 0 and 1"))
    if size < 1:
        raise UsageError(word("size", got=size, allowed="be at least 1", where=_WHERE, fix="pass size=1"))
    path_NP = path_NLE.reshape(len(path_NLE), path_NLE.shape[1] * path_NLE.shape[2])
    left = np.arange(len(path_NP))
    batches: list[tuple[int, ...]] = []
    while len(left):
        batch, asleep_P = [int(left[0])], 1 - path_NP[left[0]]
        left = left[1:]
        while len(left) and len(batch) < size:
            best = int((path_NP[left] @ asleep_P).argmin())
            batch.append(int(left[best]))
            asleep_P = asleep_P * (1 - path_NP[left[best]])
            left = np.delete(left, best)
        batches.append(tuple(batch))
    return tuple(batches)
