"""Experts spread over processes: rows travel to the process that owns their expert, and results travel back."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word
from turnout.run.choose import execute
from turnout.run.ranks.exchange import counts_from, exchange, refuse_second
from turnout.types import ExpertWeights, Routing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Owners", "expert_parallel", "spread_rows"]

_WHERE = "turnout.run.ranks.expert_parallel"


@dataclasses.dataclass(frozen=True, eq=False)
class Owners:
    """Which process of a group holds which experts: each has the same number of slots, and a slot holds one expert.

    Args:
        expert_S: (S,) int64, the expert in each slot: first the slots of process 0, then those of process 1... An
            expert may be in several slots, of different processes; then its rows are split among these copies.
        num_experts: E; every one of them is in a slot.
        group: the processes; S is a multiple of how many there are.

    Raises:
        UsageError: slots that cannot be dealt out evenly, an expert without a slot, or one twice on a process.

    Source: Lepikhin et al., 2021, "GShard", for one slot an expert; He et al., 2022, "FasterMoE", for copies.
    """

    expert_S: Tensor
    num_experts: int
    group: "ProcessGroup"

    def __post_init__(self) -> None:
        slots, ranks = self.expert_S.numel(), self.group.size()
        if slots % ranks:
            allowed, near = f"be a multiple of the {ranks} processes that share them", slots + -slots % ranks
            fix = f"pass {near} of them, or share them among {_divisor(slots, ranks)} processes (ep)"
            raise UsageError(word("the experts' slots", got=slots, allowed=allowed, where=_WHERE, fix=fix))
        held = self.expert_S.view(ranks, -1).tolist()
        twice = [rank for rank, experts in enumerate(held) if len(set(experts)) < len(experts)]
        if twice:
            got, allowed = f"{held[twice[0]]} on process {twice[0]}", "hold an expert once on each process"
            fix = "put its copies on different processes"
            raise UsageError(word("the experts' slots", got=got, allowed=allowed, where=_WHERE, fix=fix))
        missing = sorted(set(range(self.num_experts)) ^ set(self.expert_S.tolist()))
        if missing:
            got, allowed = f"{self.expert_S.tolist()}", f"hold each of the {self.num_experts} experts, and no other"
            fix = f"see to expert {missing[0]}"
            raise UsageError(word("the experts' slots", got=got, allowed=allowed, where=_WHERE, fix=fix))

    @classmethod
    def even(cls, num_experts: int, group: "ProcessGroup") -> Self:
        """Expert e belongs to process e // (E / G), and to no other.

        Raises:
            UsageError: the processes do not divide the experts.
        """
        return cls(torch.arange(num_experts), num_experts, group)

    @property
    def rank(self) -> int:
        """Which process of the group this is."""
        return self.group.rank()

    @property
    def slots(self) -> int:
        """How many experts each process holds."""
        return self.expert_S.numel() // self.group.size()

    @functools.cached_property
    def own(self) -> list[int]:
        """The experts of this process, in the order of its slots."""
        return self.expert_S[self.rank * self.slots : (self.rank + 1) * self.slots].tolist()

    @functools.cached_property
    def copied(self) -> list[int]:
        """The experts that are in more than one slot."""
        return (torch.bincount(self.expert_S, minlength=self.num_experts) > 1).nonzero().flatten().tolist()

    @functools.cached_property
    def in_order(self) -> bool:
        """Whether slot s holds expert s, so that entries sorted by expert are sorted by slot."""
        return self.expert_S.tolist() == list(range(self.num_experts))

    def slot_of(self, routing: Routing) -> Tensor:
        """(R,) int64, the slot that each entry goes to: among copies in turn, each process beginning with another."""
        device = routing.token_R.device
        if self.in_order:
            return routing.expert_R
        count_E = torch.bincount(self.expert_S, minlength=self.num_experts).to(device)
        first_E = count_E.cumsum(0) - count_E
        slot_C = self.expert_S.sort(stable=True).indices.to(device)  # expert by expert
        place_R = torch.arange(routing.num_entries, device=device) - routing.offset_E[routing.expert_R]
        turn_R = (place_R + self.rank) % count_E[routing.expert_R]
        return slot_C[first_E[routing.expert_R] + turn_R]


def _divisor(slots: int, ranks: int) -> int:
    return max(each for each in range(1, ranks + 1) if slots % each == 0)


def expert_parallel(
    x_TD: Tensor, routing: Routing, weights: ExpertWeights, owners: Owners, *, backend: str = "auto"
) -> Tensor:
    """Each token's weighted sum of its experts' outputs, where every process has other tokens and other experts.

    All processes of the group call it together, each with its own tokens, of which there may be none. Gradients are
    sums: what an expert's weights get is the gradient of all the processes' tokens, once and undivided, whichever
    process they came from; what copies of an expert get is the sum over all of them, the same on each.

    Args:
        x_TD: (T, D), this process's tokens.
        routing: which of all E experts each takes, and with what weight.
        weights: the experts of this process alone, in the order of its slots.
        owners: who holds what.
        backend: an executor of ``turnout.run`` for the experts here, or "auto".

    Returns:
        (T, D) in x's dtype; tokens without entries are zero.

    Raises:
        ShapeError: the weights are not those of this process's slots, or the routing is of other experts.

    Source: Lepikhin et al., 2021, "GShard", without its capacity: what is sent is as uneven as the routing is.
    """
    weights = _copies_summed(weights, owners)
    if weights.num_experts != owners.slots:
        got, allowed = f"{weights.num_experts} experts", f"be the {owners.slots} that this process holds"
        fix = f"pass the weights of experts {owners.own}"
        raise ShapeError(word("weights", got=got, allowed=allowed, where=_WHERE, fix=fix))

    def run(row_ND: Tensor, own: Routing) -> Tensor:
        return execute(row_ND, own, weights, backend=backend)

    return spread_rows(x_TD, routing, owners, run)


def spread_rows(x_TD: Tensor, routing: Routing, owners: Owners, run: Callable[[Tensor, Routing], Tensor]) -> Tensor:
    """Sends each entry's row to the process of its expert, runs it there, and adds up what comes back.

    Args:
        x_TD: (T, D), this process's tokens.
        routing: which of all E experts each takes, and with what weight.
        owners: who holds what.
        run: gives (N, D) of rows (N, D) that came here and their routing over this process's slots, of weight 1.

    Returns:
        (T, D) in x's dtype.

    Raises:
        ShapeError: the routing is of other experts, or of other tokens.
    """
    if routing.num_experts != owners.num_experts or routing.num_tokens != len(x_TD):
        got = f"{routing.num_tokens} tokens x {routing.num_experts} experts"
        allowed = f"be of {len(x_TD)} tokens x {owners.num_experts} experts"
        fix = "route among all experts, also those of other processes"
        raise ShapeError(word("the routing", got=got, allowed=allowed, where=_WHERE, fix=fix))
    ranks, slots, group = owners.group.size(), owners.slots, owners.group
    slot_R = owners.slot_of(routing)
    order_R = None if owners.in_order else slot_R.argsort(stable=True)  # else entries are sorted by slot already
    sent_GS = torch.bincount(slot_R, minlength=ranks * slots).view(ranks, slots)
    received_GS = counts_from(sent_GS, group)
    sent, received = sent_GS.sum(1).tolist(), received_GS.sum(1).tolist()
    # In the order of the routing before and after, so that no sum depends on who holds which expert.
    entry_RD = x_TD.index_select(0, routing.token_R)
    row_ND = exchange(entry_RD if order_R is None else entry_RD[order_R], sent, received, group)
    out_RD = exchange(run(row_ND, _own(received_GS, row_ND)), received, sent, group)
    out_RD = out_RD if order_R is None else out_RD[order_R.argsort()]
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
    weighted_RD = out_RD.to(wide) * routing.weight_R[:, None].to(wide)
    return y_TD.index_add(0, routing.token_R, weighted_RD).to(x_TD.dtype)


def _own(received_GS: Tensor, row_ND: Tensor) -> Routing:
    """The routing over this process's slots of rows that came process by process, each sorted by slot."""
    ranks, slots = received_GS.shape
    slot_N = torch.arange(slots, device=received_GS.device).repeat(ranks).repeat_interleave(received_GS.flatten())
    load_S = received_GS.sum(0)
    return Routing(
        token_R=slot_N.argsort(stable=True),
        weight_R=row_ND.new_ones(len(row_ND)),
        offset_E=torch.nn.functional.pad(load_S.cumsum(0), (1, 0)),
        num_tokens=len(row_ND),
    )


# ---- copies of an expert


def _copies_summed(weights: ExpertWeights, owners: Owners) -> ExpertWeights:
    """The same weights; the gradient of an expert with copies becomes the sum of all its copies' gradients."""
    if not owners.copied:
        return weights
    stacks = {f.name: getattr(weights, f.name) for f in dataclasses.fields(weights)}
    tensors = {name: _CopiesSummed.apply(one, owners) for name, one in stacks.items() if isinstance(one, Tensor)}
    return dataclasses.replace(weights, **tensors)


class _CopiesSummed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stack: Tensor, owners: Owners) -> Tensor:
        ctx.owners = owners
        return stack.view_as(stack)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyrefly: ignore[bad-override] - torch declares *grads
        import torch.distributed as dist

        refuse_second(grad)
        owners: Owners = ctx.owners
        place = {expert: place for place, expert in enumerate(owners.copied)}
        slots = [slot for slot, expert in enumerate(owners.own) if expert in place]
        slot_C = torch.tensor(slots, dtype=torch.int64, device=grad.device)
        place_C = torch.tensor([place[owners.own[slot]] for slot in slots], dtype=torch.int64, device=grad.device)
        total = grad.new_zeros(len(place), *grad.shape[1:]).index_copy(0, place_C, grad[slot_C])
        dist.all_reduce(total, group=owners.group)
        return grad.index_copy(0, slot_C, total[place_C]), None
