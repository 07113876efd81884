"""One layout of experts for every parallelism: each step chooses between moving tokens and moving weights."""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word
from turnout.run.choose import execute
from turnout.run.ranks.exchange import refuse_second
from turnout.run.ranks.expert_parallel import Owners, spread_rows
from turnout.types import ExpertWeights, Routing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Switch"]

_WHERE = "turnout.run.Switch"


class Switch:
    """Experts spread over processes, each always holding the same part of them, run in any parallelism of ``degrees``.

    With E >= W each of the W processes holds E / W experts. With E < W, W / E processes share one: each holds as much
    of its hidden units. Degree r says how a step is run:
    0, data parallel: every process gathers all weights, and no token travels;
    1, expert parallel: the processes that share an expert gather it, and each takes a part of its tokens;
    W / E, expert and model parallel: nothing is gathered, and a token goes to all processes that share its expert;
    between, both: groups of W / (E r) processes gather, and a token goes to one in each of r groups.
    Outputs and gradients are the same, and nothing migrates from one step to the next.

    All processes make it together, as it makes groups of them.

    Args:
        num_experts: E.
        group: W processes.

    Raises:
        UsageError: neither divides the other.

    Source: Hwang et al., 2023, "Tutel: Adaptive Mixture-of-Experts at Scale", adaptive parallelism switching; its
    all-to-alls pad to a capacity, ours are as uneven as the routing is.
    """

    def __init__(self, num_experts: int, group: "ProcessGroup") -> None:
        import torch.distributed as dist

        world = group.size()
        if num_experts % world and world % num_experts:
            allowed = f"divide the {world} processes, or be a multiple of them"
            fix = f"pass {num_experts + -num_experts % world} experts, or share them among fewer processes"
            raise UsageError(word("the experts", got=num_experts, allowed=allowed, where=_WHERE, fix=fix))
        self.num_experts, self.group = num_experts, group
        self.share, self.slots = max(1, world // num_experts), max(1, num_experts // world)
        self._near: dict[int, ProcessGroup] = {world: group}  # how many gather together -> who
        ranks = dist.get_process_group_ranks(group)
        for size in (size for size in range(2, self.share + 1) if self.share % size == 0 and size < world):
            for first in range(0, world, size):
                made = dist.new_group(ranks[first : first + size])
                if first <= group.rank() < first + size:
                    self._near[size] = made  # pyrefly: ignore[unsupported-operation] - this process is in it

    @property
    def degrees(self) -> tuple[int, ...]:
        """Every r that a step may be run with."""
        return (0, *(r for r in range(1, self.share + 1) if self.share % r == 0))

    def part(self, whole: ExpertWeights) -> ExpertWeights:
        """What this process keeps of all experts' weights; of a gated activation, the same units' gates and values.

        Raises:
            UsageError: hidden units that the processes do not divide, or biases where they are divided.
        """
        first = self.group.rank() // self.share * self.slots
        own = slice(first, first + self.slots)
        biases = (whole.up_bias_EH, whole.down_bias_ED)
        if self.share > 1 and (whole.hidden % self.share or any(one is not None for one in biases)):
            got = "experts with biases" if whole.hidden % self.share == 0 else f"{whole.hidden} hidden units"
            allowed, fix = f"be without biases, their hidden units divided by {self.share}", "share them among fewer"
            raise UsageError(word("the experts", got=got, allowed=allowed, where=_WHERE, fix=fix))
        units = whole.hidden // self.share
        mine = slice(self.group.rank() % self.share * units, (self.group.rank() % self.share + 1) * units)
        up_EDH = _joined(_by_unit(whole.up_EDH[own], whole)[..., mine], whole)
        down_EFD = whole.down_EFD[own][:, mine]
        up_bias, down_bias = (None if one is None else one[own] for one in biases)
        return dataclasses.replace(whole, up_EDH=up_EDH, down_EFD=down_EFD, up_bias_EH=up_bias, down_bias_ED=down_bias)

    def __call__(
        self, x_TD: Tensor, routing: Routing, own: ExpertWeights, degree: int, *, backend: str = "auto"
    ) -> Tensor:
        """Each token's weighted sum of its experts' outputs; all processes call it together, with the same degree.

        Args:
            x_TD: (T, D), this process's tokens.
            routing: which of all E experts each takes, and with what weight.
            own: what ``part`` gave, as it is now.
            degree: r, one of ``degrees``.
            backend: an executor of ``turnout.run``.

        Raises:
            UsageError: another degree.
            ShapeError: other weights than this process keeps.
        """
        if degree not in self.degrees:
            fix = f"pass {self.degrees[-1]}"
            raise UsageError(word("degree", got=degree, allowed=f"be in {self.degrees}", where=_WHERE, fix=fix))
        if own.num_experts != self.slots:
            fix = "pass what Switch.part gave"
            got = f"{own.num_experts} experts"
            raise ShapeError(word("the weights", got=got, allowed=f"be of {self.slots}", where=_WHERE, fix=fix))
        if degree == 0:
            return execute(x_TD, routing, self._gathered(own, self.group.size()), backend=backend)
        near = self.share // degree
        weights = self._gathered(own, near)
        slot_S = [
            first * degree + place
            for rank in range(self.group.size())
            for place in [rank % self.share // near]
            for first in range(rank // self.share * self.slots, (rank // self.share + 1) * self.slots)
        ]
        owners = Owners(torch.tensor(slot_S), self.num_experts * degree, self.group)
        return spread_rows(
            x_TD, _copied(routing, degree), owners, lambda row_ND, mine: execute(row_ND, mine, weights, backend=backend)
        )

    def _gathered(self, own: ExpertWeights, near: int) -> ExpertWeights:
        """The weights of so many processes in a row: of one expert, or of all. Gradients are summed on the way back."""
        if near == 1:
            return own
        group, share = self._near[near], min(near, self.share)

        def whole(one: Tensor) -> Tensor:
            """(experts' groups, processes that share, slots, ...)"""
            return _Gathered.apply(one, group).unflatten(0, (near // share, share))

        up = whole(_by_unit(own.up_EDH, own)).movedim(1, -2).flatten(-2).flatten(0, 1)
        down = whole(own.down_EFD).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        up_bias, down_bias = (
            None if one is None else whole(one).flatten(0, 2) for one in (own.up_bias_EH, own.down_bias_ED)
        )
        return dataclasses.replace(
            own, up_EDH=_joined(up, own), down_EFD=down, up_bias_EH=up_bias, down_bias_ED=down_bias
        )


def _by_unit(up_EDH: Tensor, weights: ExpertWeights) -> Tensor:
    """(E, D, 2 or 1, F): gates and values of each hidden unit, or what there is without gates."""
    if not weights.gated:
        return up_EDH.unsqueeze(-2)
    return up_EDH.unflatten(-1, (-1, 2)).transpose(-1, -2) if weights.interleaved else up_EDH.unflatten(-1, (2, -1))


def _joined(up: Tensor, weights: ExpertWeights) -> Tensor:
    return (up.transpose(-1, -2) if weights.interleaved and weights.gated else up).flatten(-2)


def _copied(routing: Routing, count: int) -> Routing:
    """The routing in which every expert stands for so many in a row, and each of its entries goes to all of them."""
    if count == 1:
        return routing
    load_V = routing.load_E.repeat_interleave(count)
    offset_V = torch.nn.functional.pad(load_V.cumsum(0), (1, 0))
    first_V = routing.offset_E[:-1].repeat_interleave(count) - offset_V[:-1]
    entry_R = torch.arange(count * routing.num_entries, device=load_V.device) + first_V.repeat_interleave(load_V)
    return Routing(routing.token_R[entry_R], routing.weight_R[entry_R], offset_V, routing.num_tokens)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, one: Tensor, group: "ProcessGroup") -> Tensor:
        import torch.distributed as dist

        ctx.group = group
        found = one.new_empty(group.size(), *one.shape)
        dist.all_gather(list(found.unbind()), one.contiguous(), group=group)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyrefly: ignore[bad-override] - torch declares *grads
        import torch.distributed as dist

        refuse_second(grad)
        own = grad.new_empty(grad.shape[1:])
        dist.reduce_scatter(own, list(grad.contiguous().unbind()), group=ctx.group)
        return own, None
