"""DiLoCo and Streaming DiLoCo: many local steps, then an outer step on how far the replicas came, a part at a time."""

from collections.abc import Callable, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.train.local.average import BITS, Average, alone, payload_bytes, rounded
from turnout.train.local.lockstep import Lockstep, replicas_of

__all__ = ["DiLoCo", "nesterov"]

_WHERE = "turnout.train.local.DiLoCo"
Outer = Callable[[list[Tensor]], torch.optim.Optimizer]


def nesterov(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The outer optimizer of DiLoCo: SGD with rate 0.7 and Nesterov momentum 0.9.

    >>> nesterov([nn.Parameter(torch.zeros(1))]).defaults["lr"]
    0.7

    Source: Douillard et al., 2023, "DiLoCo: Distributed Low-Communication Training of Language Models".
    """
    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


class DiLoCo:
    """Inside ``with DiLoCo(...)`` an optimizer's steps are local; every H of them the replicas meet.

    Fragment k of K is begun at steps H (j + (k+1)/K) - tau: the outer gradient is anchor - local, rounded to ``bits``
    and averaged over all replicas while tau further local steps are taken. Then the outer optimizer steps the anchor,
    and the replica goes on from (1 - alpha) anchor + alpha local. K = 1, tau = 0, alpha = 0 is DiLoCo. What the inner
    optimizers keep stays with each replica.

    Args:
        models: this process's replica, or several, for many replicas in one process; all start alike, on all processes.
        optimizers: the inner optimizer of each.
        every: H, the local steps between two meetings of the same parameter; a multiple of the number of fragments.
        fragments: K, or the names of each fragment's parameters. A number splits the parameters, in their order, into
            parts of about the same size.
        outer: from a fragment's anchors to their own optimizer; called once a fragment, and must not share.
        delay: tau, at least 0 and below H / K.
        mix: alpha, the local share after a meeting, from 0 to 1.
        bits: of a number on the wire: 32, 8 or 4 (E3M0).
        average: over processes: ``over(group)`` of a process group; None is this process alone.

    Raises:
        UsageError: settings that do not go together, replicas that differ, or an outer optimizer of two fragments.

    >>> import copy
    >>> model = nn.Linear(2, 1)
    >>> pair = [model, copy.deepcopy(model)]
    >>> inner = [torch.optim.SGD(one.parameters(), lr=0.1) for one in pair]
    >>> with DiLoCo(pair, inner, every=2) as met:
    ...     for step in range(4):
    ...         for one, optimizer in zip(pair, inner):
    ...             optimizer.zero_grad()
    ...             one(torch.randn(4, 2)).square().mean().backward()
    ...             optimizer.step()
    >>> met.meetings, bool(torch.equal(pair[0].weight, pair[1].weight)), met.sent_bytes
    ([(2, 0), (4, 0)], True, 24)

    Source: Douillard et al., 2023, "DiLoCo"; Douillard et al., 2025, "Streaming DiLoCo with Overlapping
    Communication"; the schedule of fragments is that of torchft's local_sgd.py. Where we differ: fragments are
    parts of the parameters' order and not every K-th layer; one outer optimizer for two fragments, which torchft
    takes and which ends in NaN, is refused.
    """

    def __init__(
        self,
        models: "nn.Module | Sequence[nn.Module]",
        optimizers: "torch.optim.Optimizer | Sequence[torch.optim.Optimizer]",
        *,
        every: int,
        fragments: "int | Sequence[Sequence[str]]" = 1,
        outer: Outer = nesterov,
        delay: int = 0,
        mix: float = 0.0,
        bits: int = 32,
        average: "Average | None" = None,
    ) -> None:
        self._replicas, inner = replicas_of(models, optimizers, _WHERE)
        names = _parts(self._replicas[0], fragments)
        _check(every, len(names), delay, mix, bits)
        self._every, self._delay, self._mix, self._bits = every // len(names), delay, mix, bits
        self._average: Average = alone if average is None else average
        self._fragments = _built(self._replicas[0], names, outer)
        self._lockstep = Lockstep(inner, self._after, where=_WHERE)
        self._pending: Callable[[], Tensor] | None = None
        self.meetings: list[tuple[int, int]] = []  # (step, fragment) of each outer step
        self.message_bytes: list[int] = []  # that one replica has handed over, meeting by meeting

    def __enter__(self) -> "DiLoCo":
        self._lockstep.enter()
        return self

    def __exit__(
        self, kind: "type[BaseException] | None", error: "BaseException | None", trace: "TracebackType | None"
    ) -> None:
        self._lockstep.exit()

    @property
    def sent_bytes(self) -> int:
        """What one replica has handed over so far."""
        return sum(self.message_bytes)

    def anchors(self) -> dict[str, Tensor]:
        """The outer parameters by name: what all replicas agree on, and what is saved or measured."""
        return {name: one.detach() for fragment in self._fragments for name, one in fragment[0].items()}

    def state_dict(self) -> dict[str, object]:
        """Anchors, outer optimizers and the count of steps. A fragment on its way is in nobody's: save between.

        Raises:
            UsageError: a fragment has been begun and not met.
        """
        if self._pending is not None:
            fix = "save at a step at which no fragment is on its way (a multiple of H / K)"
            allowed, got = "have no fragment on its way", "one begun"
            raise UsageError(word("what is saved", got=got, allowed=allowed, where=f"{_WHERE}.state_dict", fix=fix))
        outer = [optimizer.state_dict() for _, optimizer in self._fragments]
        return {"anchors": self.anchors(), "outer": outer, "step": self._lockstep.steps[0]}

    def load_state_dict(self, state: "dict[str, object]") -> None:
        """Takes what ``state_dict`` gave. Build it on new models first; then load this, and what the models were."""
        anchors, outer = state["anchors"], state["outer"]
        mine = self.anchors()
        if not isinstance(anchors, dict) or not isinstance(outer, list) or set(anchors) != set(mine):
            fix, got = "load it into a DiLoCo with the same model and fragments", f"{len(mine)} other parameters"
            where = f"{_WHERE}.load_state_dict"
            raise UsageError(word("the state", got=got, allowed="be of this model", where=where, fix=fix))
        for name, one in mine.items():
            one.copy_(anchors[name])
        for (_, optimizer), kept in zip(self._fragments, outer, strict=True):
            optimizer.load_state_dict(kept)
        self._lockstep.steps = [int(str(state["step"]))] * len(self._replicas)

    def _after(self, step: int) -> None:
        """Called when all replicas of this process have taken that step."""
        if (step + self._delay) % self._every == 0:
            self._begin((step + self._delay) // self._every - 1)
        if step % self._every == 0:
            self._meet(step)

    @torch.no_grad()
    def _begin(self, meeting: int) -> None:
        anchors, _ = self._fragments[meeting % len(self._fragments)]
        total_N: Tensor | None = None
        for replica in self._replicas:
            outer_N = torch.cat([(one - replica[name]).flatten() for name, one in anchors.items()])
            if len(self._replicas) > 1:  # each is rounded as if it came over a wire
                outer_N = rounded(outer_N, self._bits)
            total_N = outer_N if total_N is None else total_N + outer_N
        assert total_N is not None, "there is a replica"
        here = total_N / len(self._replicas)
        self._pending = self._average(here, bits=self._bits if len(self._replicas) == 1 else 32)
        self.message_bytes.append(payload_bytes(len(here), self._bits))

    @torch.no_grad()
    def _meet(self, step: int) -> None:
        at = (step // self._every - 1) % len(self._fragments)
        anchors, optimizer = self._fragments[at]
        assert self._pending is not None, "every fragment is begun before it is met"
        mean_N, self._pending = self._pending(), None
        pieces = mean_N.split([one.numel() for one in anchors.values()])
        for one, piece in zip(anchors.values(), pieces, strict=True):
            one.grad = piece.view_as(one)
        optimizer.step()
        optimizer.zero_grad()
        for replica in self._replicas:
            for name, one in anchors.items():
                replica[name].copy_(one.lerp(replica[name], self._mix) if self._mix else one)
        self.meetings.append((step, at))


def _check(every: int, fragments: int, delay: int, mix: float, bits: int) -> None:
    wrong = {
        "every": (every, every >= 1 and every % fragments == 0, f"be a positive multiple of the {fragments} fragments",
                  f"pass every={max(1, round(every / fragments)) * fragments}"),
        "delay": (delay, 0 <= delay < max(1, every // fragments), "be at least 0 and below every / fragments",
                  "pass delay=0"),
        "mix": (mix, 0 <= mix <= 1, "be between 0 and 1", "pass mix=0.0"),
        "bits": (bits, bits in BITS, f"be one of {BITS}", "pass bits=32"),
    }  # fmt: skip
    for what, (got, right, allowed, fix) in wrong.items():
        if not right:
            raise UsageError(word(what, got=got, allowed=allowed, where=_WHERE, fix=fix))


def _parts(named: dict[str, Tensor], fragments: "int | Sequence[Sequence[str]]") -> list[list[str]]:
    """The names of each fragment's parameters; every name is in one."""
    if not isinstance(fragments, int):
        parts = [list(part) for part in fragments]
        if sorted(name for part in parts for name in part) != sorted(named) or not all(parts):
            told = [name for part in parts for name in part]
            odd = next((name for name in [*named, *told] if (name in named) + told.count(name) != 2), "an empty one")
            fix, allowed = "leave each name once, or pass a number", "hold every trained parameter once"
            raise UsageError(word("fragments", got=f"{odd!r} amiss", allowed=allowed, where=_WHERE, fix=fix))
        return parts
    if not 1 <= fragments <= len(named):
        allowed, fix = f"be from 1 to the {len(named)} parameters", "pass fragments=1"
        raise UsageError(word("fragments", got=fragments, allowed=allowed, where=_WHERE, fix=fix))
    whole, seen, parts = sum(one.numel() for one in named.values()), 0, [[] for _ in range(fragments)]
    order = list(named)
    for place, name in enumerate(order):
        at = min(fragments - 1, seen * fragments // max(1, whole))
        first_empty = next((n for n, part in enumerate(parts) if not part), fragments)
        at = min(at, first_empty)  # no fragment is left out
        if fragments - first_empty >= len(order) - place:  # as many names left as fragments without any
            at = first_empty
        parts[at].append(name)
        seen += named[name].numel()
    return parts


def _built(
    named: dict[str, Tensor], parts: list[list[str]], outer: Outer
) -> list[tuple[dict[str, Tensor], torch.optim.Optimizer]]:
    """Anchors and outer optimizer of each fragment."""
    built: list[tuple[dict[str, Tensor], torch.optim.Optimizer]] = []
    for part in parts:
        anchors: dict[str, Tensor] = {name: nn.Parameter(named[name].detach().clone()) for name in part}
        optimizer = outer(list(anchors.values()))
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        if held != {id(one) for one in anchors.values()} or any(optimizer is other for _, other in built):
            fix = "pass a function that builds a new optimizer of what it is given: outer=turnout.train.local.nesterov"
            allowed = "be a new optimizer of one fragment's anchors alone"
            raise UsageError(word("outer", got="one that is shared or holds other tensors", allowed=allowed,
                                  where=_WHERE, fix=fix))  # fmt: skip
        built.append((anchors, optimizer))
    return built
