"""CO2: local steps while the last round's average is on its way, and an outer step on what is one round old."""

import dataclasses
from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.train.local.average import Average, alone, payload_bytes
from turnout.train.local.lockstep import Lockstep, replicas_of

__all__ = ["CO2", "Overlap", "overlap"]

_WHERE = "turnout.train.local.CO2"


class CO2:
    """Inside ``with CO2(...)`` an optimizer's steps are local; every tau of them a round ends, and nobody waits.

    At the end of round t the average of what the replicas have come to is begun, and that of round t - staleness is
    waited for: it has had all of this round to arrive. With x_t the start of round t and r = t - staleness,

        m = beta m + (x_r - mean of the replicas at the end of r) / Lambda,  m clipped entrywise to [-c, c],
        x_(t+1) = x_t - alpha m,

    and all replicas go on from x_(t+1). Lambda, the staleness gap penalty, is 1 + |x_t - x_r| / C where C is the mean
    over all rounds so far of how far one round moves: about 2 when moves are of usual length, 1 when nothing is stale.
    With staleness 0, beta 0 and alpha 1 this is LocalSGD.

    Args:
        models: this process's replica, or several, for many replicas in one process; all start alike, on all processes.
        optimizers: the inner optimizer of each.
        every: tau, local steps a round.
        staleness: 1, or 0 to wait for the round's own average.
        rate: alpha of the outer step, above 0.
        momentum: beta of the outer step, from 0 to below 1.
        penalty: whether Lambda is applied.
        clip: c, above 0; None is none.
        average: over processes: ``over(group)`` of a process group; None is this process alone.

    Raises:
        UsageError: settings out of range, or replicas that differ.

    >>> import copy
    >>> model = nn.Linear(2, 1)
    >>> pair = [model, copy.deepcopy(model)]
    >>> inner = [torch.optim.SGD(one.parameters(), lr=0.1) for one in pair]
    >>> with CO2(pair, inner, every=2) as overlapped:
    ...     for step in range(4):
    ...         for one, optimizer in zip(pair, inner):
    ...             optimizer.zero_grad()
    ...             one(torch.randn(4, 2)).square().mean().backward()
    ...             optimizer.step()
    >>> overlapped.rounds, bool(torch.equal(pair[0].weight, pair[1].weight))
    (2, True)

    Source: Sun et al., 2024, "CO2: Efficient Distributed Training with Full Communication-Computation Overlap".
    Where we differ: the published code (fairscale-CO2) divides by a constant penalty, 1 unless given, and its clip
    leaves what it clips as it is; ours measures the gap as Barkai et al., 2020, "Gap-Aware Mitigation of Gradient
    Staleness", do, and clips. The state of the inner optimizers stays local.
    """

    def __init__(
        self,
        models: "nn.Module | Sequence[nn.Module]",
        optimizers: "torch.optim.Optimizer | Sequence[torch.optim.Optimizer]",
        *,
        every: int,
        staleness: int = 1,
        rate: float = 1.0,
        momentum: float = 0.5,
        penalty: bool = True,
        clip: "float | None" = 1.0,
        average: "Average | None" = None,
    ) -> None:
        _check(every, staleness, rate, momentum, clip)
        self._replicas, inner = replicas_of(models, optimizers, _WHERE)
        self._every, self._staleness, self._penalty, self._clip = every, staleness, penalty, clip
        self._rate, self._momentum = rate, momentum
        self._average: Average = alone if average is None else average
        self._start_N = _flat(self._replicas[0])  # x_t
        self._momentum_N = torch.zeros_like(self._start_N)
        self._waiting: list[tuple[Tensor, Callable[[], Tensor]]] = []  # x_r and its average
        self._moved = 0.0  # over all rounds
        self._lockstep = Lockstep(inner, self._after, where=_WHERE)
        self.rounds = 0
        self.sent_bytes = 0  # that one replica has handed over
        self.penalties: list[float] = []  # Lambda of each outer step

    def __enter__(self) -> "CO2":
        self._lockstep.enter()
        return self

    def __exit__(
        self, kind: "type[BaseException] | None", error: "BaseException | None", trace: "TracebackType | None"
    ) -> None:
        self._lockstep.exit()

    @torch.no_grad()
    def _after(self, step: int) -> None:
        if step % self._every:
            return
        self.rounds += 1
        total_N = torch.stack([_flat(replica) for replica in self._replicas]).mean(0)
        self._waiting.append((self._start_N.clone(), self._average(total_N, bits=32)))
        self.sent_bytes += payload_bytes(len(total_N), 32)
        if len(self._waiting) > self._staleness:  # in the first round there is nothing to wait for
            then_N, arrive = self._waiting.pop(0)
            before_N = self._start_N.clone()
            self._outer(then_N, arrive())
            self._moved += float((self._start_N - before_N).norm())
        for replica in self._replicas:
            _fill(replica, self._start_N)

    def _outer(self, then_N: Tensor, mean_N: Tensor) -> None:
        gap, done = float((self._start_N - then_N).norm()), len(self.penalties)
        usual = self._moved / done if done else 0.0
        penalty = 1.0 + gap / usual if self._penalty and usual else 1.0
        self.penalties.append(penalty)
        self._momentum_N.mul_(self._momentum).add_(then_N - mean_N, alpha=1 / penalty)
        if self._clip is not None:
            self._momentum_N.clamp_(-self._clip, self._clip)
        self._start_N.sub_(self._momentum_N, alpha=self._rate)


@dataclasses.dataclass(frozen=True)
class Overlap:
    """What a run of rounds takes, by a simulation of events; seconds.

    Args:
        total_s: from the start to the last outer step.
        exposed_s: of it, waiting for averages.

    >>> overlap(rounds=10, every=4, step_s=1.0, average_s=3.0).exposed_s
    0.0

    Source: none; plain bookkeeping.
    """

    total_s: float
    exposed_s: float


def overlap(*, rounds: int, every: int, step_s: float, average_s: float, staleness: int = 1) -> Overlap:
    """Rounds of ``every`` steps on one resource and an average a round on another, which takes one after the other.

    With staleness 1 every round but the first waits max(0, average - every x step); with 0 each waits the average.

    Args:
        rounds: how many, at least 1.
        every: tau.
        step_s: a local step.
        average_s: an average over all replicas.
        staleness: 0 or 1.

    Raises:
        UsageError: a setting out of range.

    >>> overlap(rounds=5, every=4, step_s=1.0, average_s=6.0).exposed_s, 4 * max(0.0, 6.0 - 4 * 1.0)
    (8.0, 8.0)

    Source: Sun et al., 2024, "CO2", whose time-line this computes.
    """
    _check(every, staleness, 1.0, 0.0, None)
    if rounds < 1 or step_s < 0 or average_s < 0:
        got, fix = f"rounds={rounds}, step_s={step_s}, average_s={average_s}", "pass rounds=1 and times of at least 0"
        where = "turnout.train.local.overlap"
        raise UsageError(word("the rounds", got=got, allowed="be at least one, of times from 0", where=where, fix=fix))
    now, wire_free, exposed, ends = 0.0, 0.0, 0.0, []
    for number in range(rounds):
        now += every * step_s
        wire_free = max(now, wire_free) + average_s
        ends.append(wire_free)
        if number >= staleness:
            wait = max(0.0, ends[number - staleness] - now)
            exposed, now = exposed + wait, now + wait
    return Overlap(now, exposed)


def _check(every: int, staleness: int, rate: float, momentum: float, clip: "float | None") -> None:
    wrong = {
        "every": (every, every >= 1, "be at least 1", "pass every=1"),
        "staleness": (staleness, staleness in (0, 1), "be 0 or 1", "pass staleness=1"),
        "rate": (rate, 0 < rate < float("inf"), "be above 0", "pass rate=1.0"),
        "momentum": (momentum, 0 <= momentum < 1, "be at least 0 and below 1", "pass momentum=0.5"),
        "clip": (clip, clip is None or clip > 0, "be above 0 or None", "pass clip=None"),
    }
    for what, (got, right, allowed, fix) in wrong.items():
        if not right:
            raise UsageError(word(what, got=got, allowed=allowed, where=_WHERE, fix=fix))


def _flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([one.detach().flatten() for one in named.values()])


def _fill(named: dict[str, Tensor], value_N: Tensor) -> None:
    for one, piece in zip(named.values(), value_N.split([one.numel() for one in named.values()]), strict=True):
        one.copy_(piece.view_as(one))
