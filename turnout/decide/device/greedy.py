"""Greedy: a pipeline played forward in time, each device doing the best of what it can whenever it is free."""

import dataclasses
import heapq
import math
from collections import deque
from collections.abc import Sequence
from typing import Literal

from turnout.types.stage_costs import StageCosts

__all__ = ["Policy", "greedy"]

_SLACK = 1e-9


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a free device prefers.

    Args:
        ahead_R: for each device, what its microbatches may hold before it takes another into its first stage.
        first: whether I goes before F, F before I, or they go in turns.
        deep: whether of two forwards the one of the later stage goes first.
        patience: the share of W that has to fit before the next arrival that is known, for W to begin.
        wait: the share of F during which an I that is known to come is waited for.
        even: whether a W that does not fit is begun where waiting would make the device the one that waited longest.
        line_R: for each device its F and I in the order in which they are to be done, whatever the times; only W goes
            where there is room. None for the rules above.
    """

    ahead_R: tuple[float, ...]
    first: Literal["I", "F", "turns"] = "turns"
    deep: bool = True
    patience: float = 0.0
    wait: float = 0.0
    even: bool = False
    line_R: Sequence[Sequence[int]] | None = None


def greedy(
    costs: StageCosts, rank_of_stage: Sequence[int], microbatches: int, memory: float, policy: Policy
) -> list[list[int]] | None:
    """For each device its tasks in the order of a play under the policy, numbered as ``solve.pipeline`` does.

    Args:
        costs: of the stages.
        rank_of_stage: who holds them.
        microbatches: m.
        memory: what the microbatches of a device may hold.
        policy: what is preferred.

    Returns:
        The orders; None where the devices wait for each other's memory.
    """
    play = _Play(costs, tuple(rank_of_stage), microbatches, memory, policy)
    while play.events:
        now, rank = heapq.heappop(play.events)
        if play.free[rank] <= now + _SLACK:
            play.decide(rank, now)
    whole = sum(map(len, play.order)) == 3 * costs.stages * microbatches
    return play.order if whole else None


class _Play:
    """What has been done so far, and when what comes next arrives."""

    def __init__(
        self, costs: StageCosts, rank_of_stage: tuple[int, ...], microbatches: int, memory: float, policy: Policy
    ) -> None:
        stages, ranks = costs.stages, max(rank_of_stage) + 1
        self.costs, self.rank_of_stage, self.m, self.policy = costs, rank_of_stage, microbatches, policy
        self.memory = memory
        self.count = stages * microbatches
        self.took = {
            kind: [time + costs.overhead for time in each]
            for kind, each in (("F", costs.forward_S), ("I", costs.input_S), ("W", costs.weight_S))
        }
        self.held, self.kept = costs.held_S, costs.kept
        self.own = [[s for s in range(stages) if rank_of_stage[s] == rank] for rank in range(ranks)]
        self.limit = [self._limits(own, memory, policy.ahead_R[rank]) for rank, own in enumerate(self.own)]
        self.ready_F = [[0.0 if s == 0 else math.inf] * microbatches for s in range(stages)]
        self.ready_I = [[math.inf] * microbatches for _ in range(stages)]
        self.next_F, self.next_I = [0] * stages, [0] * stages
        self.late: list[deque[tuple[int, int]]] = [deque() for _ in range(ranks)]
        self.free, self.holds, self.last = [0.0] * ranks, [0.0] * ranks, ["I"] * ranks
        self.done, self.idle = [0] * ranks, [0.0] * ranks
        self.order: list[list[int]] = [[] for _ in range(ranks)]
        self.events: list[tuple[float, int]] = [(0.0, rank) for rank in range(ranks)]

    def _limits(self, own: list[int], memory: float, ahead: float) -> dict[int, float]:
        """What a device may hold before each forward: room for a microbatch's later stages there stays free."""
        limit, after = {}, 0.0
        for stage in reversed(own):
            limit[stage] = memory - after - self.held[stage] + _SLACK
            after += self.held[stage]
        if own:  # at least one microbatch has to go through
            limit[own[0]] = min(limit[own[0]], max(ahead - self.held[own[0]], 0.0) + _SLACK)
        return limit

    def decide(self, rank: int, now: float) -> None:
        """Has a free device do the best of what it can, if anything."""
        if self.policy.line_R is not None:
            self._follow(rank, now, self.policy.line_R[rank])
            return
        forward, backward, full = None, None, False
        soon = math.inf  # when the next thing that is known to come does
        soon_I = math.inf
        own = self.own[rank]
        for stage in reversed(own) if self.policy.deep else own:
            m = self.next_F[stage]
            if m < self.m and (ready := self.ready_F[stage][m]) < math.inf:
                if self.holds[rank] > self.limit[rank][stage]:
                    full = full or ready <= now + _SLACK
                elif ready <= now + _SLACK:
                    forward = stage if forward is None else forward
                else:
                    soon = min(soon, ready)
            m = self.next_I[stage]
            if m < self.m and (ready := self.ready_I[stage][m]) < math.inf:
                if ready > now + _SLACK:
                    soon_I = min(soon_I, ready)
                elif backward is None or m < self.next_I[backward]:
                    backward = stage
        if forward is not None and backward is not None:
            turn = self.policy.first if self.policy.first != "turns" else "F" if self.last[rank] == "I" else "I"
            self._do(rank, turn, forward if turn == "F" else backward, now)
        elif backward is not None:
            self._do(rank, "I", backward, now)
        elif forward is not None and soon_I >= now + self.policy.wait * self.took["F"][forward]:
            self._do(rank, "F", forward, now)
        elif self.late[rank]:
            stage, _ = self.late[rank][0]
            if full or self._pays(rank, stage, now, min(soon, soon_I)):
                self._do(rank, "W", stage, now)

    def _follow(self, rank: int, now: float, line: Sequence[int]) -> None:
        """What is next in the line, or a W where that has not come, or has no room."""
        done, soon, full = self.done[rank], math.inf, False
        if done < len(line):
            kind, (stage, m) = "FI"[line[done] // self.count], divmod(line[done] % self.count, self.m)
            soon = (self.ready_F if kind == "F" else self.ready_I)[stage][m]
            full = kind == "F" and self.holds[rank] + self.held[stage] > self.memory + _SLACK
            if soon <= now + _SLACK and not full:
                self.done[rank] += 1
                self._do(rank, kind, stage, now)
                return
        if self.late[rank]:
            stage, _ = self.late[rank][0]
            if (full and soon <= now + _SLACK) or self._pays(rank, stage, now, soon):
                self._do(rank, "W", stage, now)

    def _pays(self, rank: int, stage: int, now: float, soon: float) -> bool:
        """Whether a W is worth beginning before what is known to come."""
        if now + self.policy.patience * self.took["W"][stage] <= soon + _SLACK:
            return True
        return self.policy.even and soon - now > max(self.idle) - self.idle[rank] + _SLACK

    def _do(self, rank: int, kind: str, stage: int, now: float) -> None:
        end = now + self.took[kind][stage]
        if self.order[rank]:
            self.idle[rank] += now - self.free[rank]
        if kind == "W":
            _, m = self.late[rank].popleft()
            self.order[rank].append(2 * self.count + stage * self.m + m)
            self.holds[rank] -= self.kept * self.held[stage]
        elif kind == "F":
            m = self.next_F[stage]
            self.next_F[stage] += 1
            self.order[rank].append(stage * self.m + m)
            self.holds[rank] += self.held[stage]
            if stage + 1 < self.costs.stages:
                self._arrive(self.ready_F, stage, stage + 1, m, end)
            else:
                self.ready_I[stage][m] = end
        else:
            m = self.next_I[stage]
            self.next_I[stage] += 1
            self.order[rank].append(self.count + stage * self.m + m)
            self.holds[rank] -= (1 - self.kept) * self.held[stage]
            self.late[rank].append((stage, m))
            if stage:
                self._arrive(self.ready_I, stage, stage - 1, m, end)
        self.last[rank] = kind if kind != "W" else self.last[rank]
        self.free[rank] = end
        heapq.heappush(self.events, (end, rank))

    def _arrive(self, ready: list[list[float]], stage: int, other: int, m: int, end: float) -> None:
        rank = self.rank_of_stage[other]
        time = end if rank == self.rank_of_stage[stage] else end + self.costs.send
        ready[other][m] = time
        heapq.heappush(self.events, (time, rank))
