"""Gradient coding: each worker sends one combination of a few partial gradients, and any n - s of them give the sum."""

import dataclasses

import numpy as np

from turnout.errors import UsageError, word

__all__ = ["GradientCode", "gradient_code"]

_WHERE = "turnout.train.coding.gradient_code"
_WORST = 1e-9  # by which the decoded weight of a part may differ from 1


@dataclasses.dataclass(frozen=True, eq=False)
class GradientCode:
    """Who computes which of n parts, and how the sum comes out of any n - s answers.

    Args:
        weight_NN: worker w answers sum_p weight[w, p] g_p; s + 1 entries of a row are not zero.
        stragglers: s, how many answers may be missing.

    >>> code = gradient_code(4, 1)
    >>> code.parts(0), code.load
    ([0, 1], 0.5)

    Source: Tandon et al., 2017, "Gradient Coding: Avoiding Stragglers in Distributed Learning".
    """

    weight_NN: np.ndarray
    stragglers: int

    @property
    def workers(self) -> int:
        """How many workers: n."""
        return len(self.weight_NN)

    @property
    def load(self) -> float:
        """What share of all data a worker computes on: (s + 1) / n."""
        return (self.stragglers + 1) / self.workers

    def parts(self, worker: int) -> list[int]:
        """The parts that a worker computes on."""
        return np.flatnonzero(self.weight_NN[worker]).tolist()

    def encode(self, worker: int, gradient_PD: np.ndarray) -> np.ndarray:
        """The answer of a worker to the gradients of its own parts, in the order of ``parts``."""
        return self.weight_NN[worker, self.parts(worker)] @ gradient_PD

    def decode(self, answers: "dict[int, np.ndarray]") -> np.ndarray:
        """The sum over all parts out of the answers of any n - s workers, or more.

        Args:
            answers: worker -> its answer.

        Raises:
            UsageError: these workers' answers do not give the sum.
        """
        factor_W = self.factors(list(answers))
        return np.asarray(sum(f * one for f, one in zip(factor_W, answers.values(), strict=True)))

    def factors(self, workers: "list[int]") -> np.ndarray:
        """By what the answers of these workers are multiplied, so that their sum is that over all parts.

        Raises:
            UsageError: there are no such factors, to 1e-9.
        """
        rows = self.weight_NN[workers]
        factor_W = np.linalg.lstsq(rows.T, np.ones(self.workers), rcond=None)[0] if len(rows) else np.zeros(0)
        off = float(np.abs(factor_W @ rows - 1).max())
        if off > _WORST:
            got = f"{len(workers)} of {self.workers} answers, off by {off:.1e}"
            allowed, fix = f"give the sum to {_WORST}", f"wait for {self.workers - self.stragglers} workers"
            raise UsageError(word("the answers", got=got, allowed=allowed, where=f"{_WHERE}.decode", fix=fix))
        return factor_W


def gradient_code(workers: int, stragglers: int, *, seed: int = 0) -> GradientCode:
    """A code for n workers of which any s may not answer.

    Where s + 1 divides n, groups of s + 1 workers compute on the same s + 1 parts and answer their sum (fractional
    repetition): the first answer of each group is taken, and the sum is exact. Else worker w computes on the parts w
    to w + s, around a circle, with weights that are orthogonal to a random s-dimensional space (cyclic repetition).

    Args:
        workers: n, as many as parts.
        stragglers: s, from 0 to n - 1.
        seed: of the cyclic code's weights.

    Raises:
        UsageError: s out of range, or a cyclic code so large that rounding spoils it.

    >>> code = gradient_code(5, 2)
    >>> g = np.arange(10.0).reshape(5, 2)
    >>> answers = {w: code.encode(w, g[code.parts(w)]) for w in (0, 2, 3)}
    >>> bool(np.allclose(code.decode(answers), g.sum(0)))
    True

    Source: Tandon et al., 2017, "Gradient Coding: Avoiding Stragglers in Distributed Learning", algorithms 1 and 2.
    """
    if not 0 <= stragglers < workers:
        got, fix = f"{stragglers} of {workers}", f"pass stragglers={max(0, min(stragglers, workers - 1))}"
        raise UsageError(word("stragglers", got=got, allowed="be from 0 to workers - 1", where=_WHERE, fix=fix))
    weight_NN = np.zeros((workers, workers))
    each = stragglers + 1
    if workers % each == 0:
        for worker in range(workers):
            first = worker // each * each
            weight_NN[worker, first : first + each] = 1.0
        return GradientCode(weight_NN, stragglers)
    chance = np.random.default_rng(seed)
    null_SN = chance.standard_normal((stragglers, workers))
    null_SN[:, -1] = -null_SN[:, :-1].sum(1)  # so that the vector of ones is orthogonal to it
    for worker in range(workers):
        where = (worker + np.arange(each)) % workers
        weight_NN[worker, where[0]] = 1.0
        weight_NN[worker, where[1:]] = -np.linalg.solve(null_SN[:, where[1:]], null_SN[:, where[0]])
    code = GradientCode(weight_NN, stragglers)
    for trial in range(20):  # rounding spoils large ones: better to hear of it here
        some = np.random.default_rng(trial).permutation(workers)[: workers - stragglers]
        try:
            code.factors(sorted(some.tolist()))
        except UsageError as error:
            fix = f"take workers that {each} divides, where the code is exact"
            got = f"{workers} workers, {stragglers} stragglers"
            raise UsageError(
                word("the cyclic code", got=got, allowed="decode to 1e-9", where=_WHERE, fix=fix)
            ) from error
    return code
