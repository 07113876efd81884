"""Sequential gradient coding: a sequence of gradients, each due a few rounds after it began, so that time helps too."""

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from turnout.errors import UsageError, word
from turnout.train.coding.code import GradientCode, gradient_code

__all__ = ["Coded", "Multiplexed", "Scheme", "SelectiveRepeat"]

_WHERE = "turnout.train.coding"
Chunks = Callable[[int], np.ndarray]  # job -> the gradient of each chunk of its data, (chunks, D)


class Scheme(Protocol):
    """Who does what in each round, and when a job's gradient can be told.

    Job t begins in round t and is due in round t + delay. In every round the master asks whether it ``bears``
    to go on without those who are late, and ends it with ``take``.

    >>> scheme: Scheme = Coded(4, 1)
    >>> scheme.bears(np.array([False, True, False, False])), scheme.bears(np.ones(4, dtype=bool))
    (True, False)

    Source: none; what the schemes have in common.
    """

    @property
    def workers(self) -> int:
        """How many workers: n."""

    @property
    def load(self) -> float:
        """What share of a job's data one worker computes on in a round."""

    @property
    def delay(self) -> int:
        """T."""

    @property
    def shares(self) -> np.ndarray:
        """The size of each chunk of a job's data, as a share of it."""

    def bears(self, late_W: np.ndarray) -> bool:
        """Whether every open job can still be told in time if these are not waited for, and later ones all answer."""

    def take(self, late_W: np.ndarray) -> None:
        """Ends the round without the answers of these."""

    def gradient(self, job: int, chunks: Chunks) -> np.ndarray:
        """The sum over all chunks of a job that is due or past, decoded from the answers alone."""


class Coded:
    """GC: the code of Tandon et al. in every round; nothing is carried over. ``stragglers=0`` is uncoded.

    Args:
        workers: n.
        stragglers: s, that a round may lack.

    Raises:
        UsageError: s out of range.

    >>> Coded(256, 15).load, Coded(256, 0).load
    (0.0625, 0.00390625)

    Source: Tandon et al., 2017, "Gradient Coding: Avoiding Stragglers in Distributed Learning".
    """

    delay = 0

    def __init__(self, workers: int, stragglers: int) -> None:
        _check(workers, stragglers, 1, 2)
        self.workers, self.stragglers = workers, stragglers
        self.load, self.shares = (stragglers + 1) / workers, np.full(workers, 1 / workers)
        self._answered: list[np.ndarray] = []

    def bears(self, late_W: np.ndarray) -> bool:
        """At most s are late."""
        return int(late_W.sum()) <= self.stragglers

    def take(self, late_W: np.ndarray) -> None:
        """Ends the round."""
        self._answered.append(~late_W)

    def gradient(self, job: int, chunks: Chunks) -> np.ndarray:
        """The decoded sum."""
        return _decoded(gradient_code(self.workers, self.stragglers), self._answered[job], chunks(job))


class SelectiveRepeat:
    """SR-SGC: GC with s = ceil(B lambda / (W - 1 + B)); who is missed beyond s does that task again B rounds later.

    Args:
        workers: n.
        burst: B, for how many rounds a straggler is one.
        window: W, rounds in which at most lambda workers straggle; W - 1 is a multiple of B.
        stragglers: lambda.

    Raises:
        UsageError: numbers that do not go together.

    >>> round(SelectiveRepeat(256, burst=2, window=3, stragglers=23).load, 4)
    0.0508

    Source: Krishnan, Ebrahimi & Khisti, 2023, "Sequential Gradient Coding For Straggler Mitigation". Where we differ:
    the master waits when a job would miss its round, and not when the pattern leaves the (B, W, lambda) model.
    """

    def __init__(self, workers: int, *, burst: int, window: int, stragglers: int) -> None:
        _check(workers, stragglers, burst, window)
        if (window - 1) % burst:
            got, fix = f"window={window}, burst={burst}", f"pass window={(window - 1) // burst * burst + 1}"
            raise UsageError(word("window", got=got, allowed="be a multiple of burst, and 1",
                                  where=f"{_WHERE}.SelectiveRepeat", fix=fix))  # fmt: skip
        self.workers, self.delay = workers, burst
        self.spare = math.ceil(burst * stragglers / (window - 1 + burst))
        self.load, self.shares = (self.spare + 1) / workers, np.full(workers, 1 / workers)
        self._answered: list[np.ndarray] = []  # of each job
        self._begin()

    def _begin(self) -> None:
        """Round ``len(answered)``: who repeats, all others begin the new job."""
        now = len(self._answered)
        self._again_W = np.zeros(self.workers, dtype=bool)
        if now >= self.delay:
            missing = np.flatnonzero(~self._answered[now - self.delay])
            self._again_W[missing[: max(0, len(missing) - self.spare)]] = True

    def bears(self, late_W: np.ndarray) -> bool:
        """The job that is due has n - s answers."""
        due = len(self._answered) - self.delay
        return due < 0 or int((self._answered[due] | (self._again_W & ~late_W)).sum()) >= self.workers - self.spare

    def take(self, late_W: np.ndarray) -> None:
        """Ends the round."""
        due = len(self._answered) - self.delay
        if due >= 0:
            self._answered[due] = self._answered[due] | (self._again_W & ~late_W)
        self._answered.append(~self._again_W & ~late_W)
        self._begin()

    def gradient(self, job: int, chunks: Chunks) -> np.ndarray:
        """The decoded sum."""
        return _decoded(gradient_code(self.workers, self.spare), self._answered[job], chunks(job))


class Multiplexed:
    """M-SGC: most of a job is uncoded and repeated where it was missed, the rest coded; a round mixes W - 1 + B jobs.

    Slot m of round r is of job r - m. In slots 0 to W - 2 a worker computes its own chunks; in the B slots after them
    the chunks that it was missed with, and once it has none left, a combination of lambda + 1 small chunks, coded over
    all workers, one group a slot.

    Args:
        workers: n.
        burst: B, for how many rounds a straggler is one.
        window: W, rounds in which at most lambda workers straggle; above B.
        stragglers: lambda, below n.

    Raises:
        UsageError: numbers that do not go together.

    >>> round(Multiplexed(256, burst=1, window=2, stragglers=27).load, 4)
    0.0075

    Source: Krishnan, Ebrahimi & Khisti, 2023, "Sequential Gradient Coding For Straggler Mitigation". Where we differ:
    the master waits when a job could no longer be told in time, and not when the pattern leaves the (B, W, lambda)
    model; lambda = n, which needs no code, is left out.
    """

    def __init__(self, workers: int, *, burst: int, window: int, stragglers: int) -> None:
        _check(workers, stragglers, burst, window)
        self.workers, self.stragglers = workers, stragglers
        self.burst, self.own = burst, window - 1
        self.delay = window - 2 + burst
        each = stragglers + 1
        small = 1 / (workers * (burst + self.own * each))
        self.load = each * (self.own + burst) * small
        # Chunks: worker w's own are w * own + m; after them group g's are n * own + g * n + p.
        self.shares = np.concatenate((np.full(workers * self.own, each * small), np.full(burst * workers, small)))
        self._own_JWM: list[np.ndarray] = []  # of each job: which own chunks have arrived
        self._coded_JWB: list[np.ndarray] = []  # and which workers' combination of which group
        self._open()

    def _open(self) -> None:
        self._own_JWM.append(np.zeros((self.workers, self.own), dtype=bool))
        self._coded_JWB.append(np.zeros((self.workers, self.burst), dtype=bool))

    def _after(self, job: int, slot: int, late_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What has arrived of a job after this slot."""
        own_WM, coded_WB = self._own_JWM[job].copy(), self._coded_JWB[job].copy()
        if slot < self.own:
            own_WM[:, slot] = ~late_W
        else:
            whole_W = own_WM.all(1)
            coded_WB[:, slot - self.own] = whole_W & ~late_W
            again = np.flatnonzero(~whole_W & ~late_W)
            own_WM[again, own_WM[again].argmin(1)] = True  # the first that is missing
        return own_WM, coded_WB

    def bears(self, late_W: np.ndarray) -> bool:
        """Every open job can still be told."""
        return all(self._can(*self._after(job, slot, late_W), slot) for job, slot in self._slots())

    def _slots(self) -> list[tuple[int, int]]:
        now = len(self._own_JWM) - 1
        return [(now - slot, slot) for slot in range(min(now, self.delay) + 1)]

    def _can(self, own_WM: np.ndarray, coded_WB: np.ndarray, slot: int) -> bool:
        """Whether it can be told if from the next slot on all answer."""
        done, missing_W = max(0, slot + 1 - self.own), (~own_WM[:, : slot + 1]).sum(1)
        need = self.workers - self.stragglers
        told = all(int(coded_WB[:, group].sum()) >= need for group in range(done))
        # In the k-th slot from now those who miss more than k chunks repeat, and do not code.
        later = all(int((missing_W <= k).sum()) >= need for k in range(self.burst - done))
        return told and later and int(missing_W.max()) <= self.burst - done

    def take(self, late_W: np.ndarray) -> None:
        """Ends the round."""
        for job, slot in self._slots():
            self._own_JWM[job], self._coded_JWB[job] = self._after(job, slot, late_W)
        self._open()

    def gradient(self, job: int, chunks: Chunks) -> np.ndarray:
        """The decoded sum: own chunks as they are, each group out of its answers."""
        gradient_CD, count = chunks(job), self.workers * self.own
        if not self._own_JWM[job].all():
            got, fix = f"job {job} with chunks missing", f"ask after round {job + self.delay}"
            raise UsageError(word("the job", got=got, allowed="be due", where=f"{_WHERE}.Multiplexed", fix=fix))
        code, total = gradient_code(self.workers, self.stragglers), gradient_CD[:count].sum(0)
        for group in range(self.burst):
            own_PD = gradient_CD[count + group * self.workers :][: self.workers]
            total = total + _decoded(code, self._coded_JWB[job][:, group], own_PD)
        return total


def _decoded(code: GradientCode, answered_W: np.ndarray, gradient_PD: np.ndarray) -> np.ndarray:
    """The sum, out of the answers of those who have answered."""
    there = np.flatnonzero(answered_W).tolist()
    return code.decode({worker: code.encode(worker, gradient_PD[code.parts(worker)]) for worker in there})


def _check(workers: int, stragglers: int, burst: int, window: int) -> None:
    if not (0 <= stragglers < workers and 1 <= burst < window):
        got = f"workers={workers}, stragglers={stragglers}, burst={burst}, window={window}"
        allowed = "have fewer stragglers than workers, and a burst from 1 to below the window"
        fix = "pass burst=1, window=2 and fewer stragglers"
        raise UsageError(word("the scheme", got=got, allowed=allowed, where=_WHERE, fix=fix))
