"""Which rows sorted dispatch works through, in which groups: experts by their loads, and how these are rounded up."""

import dataclasses
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from turnout.run.compiled.engine import threads
from turnout.run.tiled import suits_tiles
from turnout.run.tuned import tuning
from turnout.types import ExpertWeights, PackedWeights, Routing
from turnout.types.tuning import Tuning
from turnout.types.weights import Activation

__all__ = ["Group", "Plan", "plan_rows"]

# oneDNN compiles a kernel for every new row count, which in training is every one, and keeps it. Counts are rounded up
# to 8, and so that there are few: in fp32, where six of half a MB are kept for each, to about an eighth of themselves
# or a 16th of the mean (``Tuning.steps``), which costs nothing that shows. In 16 bits, where it would, loads near the
# mean, which have most rows when they are even, are rounded to a 32nd of it (``steps_near``), and the others, which
# differ most from step to step, to a 16th of the mean or of themselves. MKL compiles nothing for a count, nor do
# turnout's own products: counts stay.
_LEAST = 8
_NEAR = (0.75, 1.5)
# Up to this many tokens (decoding) there are few counts to compile for, and rounding up would multiply the work.
_FEW = 16
# Neighbours of about equal load that share a call. Not two of them: that saves little, and is one more kernel for every
# row count.
_BATCHES = (8, 4)
# Repeated rows are kept for the backward pass up to this many per entry; more are dropped and gathered again.
_REPEATS = 1 / 16
# Numbers per intermediate tensor of a group whose passes are one call each: what stays in a processor's second cache.
_SMALL = 1 << 15


class Group(NamedTuple):
    """Neighbouring experts with entries, and the bounds of their rows (one more than experts)."""

    experts: list[int]
    bound: list[int]
    batched: bool  # the experts follow each other without a gap and have the same number of rows

    @property
    def rows(self) -> slice:
        """Where its rows are."""
        return slice(self.bound[0], self.bound[-1])

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Each expert's part of the group's rows."""
        return (rows,) if len(self.experts) == 1 else rows.split([b - a for a, b in itertools.pairwise(self.bound)])


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a routing is run: P rows, R of them entries and the rest copies that round up each expert's count."""

    routing: Routing  # without its weights' graph
    activation: Activation
    interleaved: bool
    hidden: int
    num_tokens: int
    token_P: Tensor
    # Where each entry's row is (None: row r is entry r), and the rows ordered by token, (T, K) or ragged.
    place_R: Tensor | None
    entry_P: Tensor | None  # the entry that each row is or repeats, where there are repeats
    order_R: Tensor
    row_R: Tensor
    start_T: Tensor | None
    groups: list[Group]
    one_call: bool = False  # each pass over all groups is one

    @property
    def rows(self) -> int:
        """P."""
        return self.token_P.numel()

    @property
    def most(self) -> int:
        """Rows of the largest group."""
        return max(group.bound[-1] - group.bound[0] for group in self.groups)

    @property
    def packs(self) -> bool:
        """Whether enough rows are repeats that the up products are kept for the backward pass without them."""
        return self.place_R is not None and self.rows > self.place_R.numel() * (1 + _REPEATS)

    def entries(self, group: Group) -> slice:
        """Which entries a group's rows are."""
        bound = self.routing.bounds()
        return slice(bound[group.experts[0]], bound[group.experts[-1] + 1])

    def spread(self, value_R: Tensor) -> Tensor:
        """(P,) the values of the entries, zero on the rows that only round up."""
        if self.place_R is None:
            return value_R
        return value_R.new_zeros(self.rows).index_copy_(0, self.place_R, value_R)

    def collect(self, row_PD: Tensor, weight_R: Tensor | None) -> Tensor:
        """(T, D) the sum of each token's rows, weighted by ``weight_R`` if given."""
        each = None if weight_R is None else weight_R.index_select(0, self.order_R).to(row_PD.dtype)
        if self.start_T is None:
            index = self.row_R.view(self.num_tokens, -1)
            each = None if each is None else each.view(index.shape)
            return torch.nn.functional.embedding_bag(index, row_PD, mode="sum", per_sample_weights=each)
        return torch.nn.functional.embedding_bag(
            self.row_R, row_PD, self.start_T, mode="sum", per_sample_weights=each, include_last_offset=True
        )


def plan_rows(
    routing: Routing, weights: ExpertWeights | PackedWeights, x_TD: Tensor, *, one_call: bool = False
) -> Plan:
    """The plan for these tokens: whose rows are next to each other, and how many each expert has.

    With ``one_call`` (``turnout.run.compiled.passes``) in groups so small that all of one stays in the caches.
    """
    here, bound = tuning(), routing.bounds()
    load = [b - a for a, b in itertools.pairwise(bound)]
    token_P, place_R, entry_P = routing.token_R, None, None
    step = max((_SMALL * threads() if one_call else here.group) // weights.hidden, 1)
    short = x_TD.dtype.itemsize == 2
    mean = routing.num_entries / max(len(load) - load.count(0), 1)
    compiles = _compiles(x_TD, mean * weights.width * weights.hidden, here)
    if routing.num_tokens > _FEW and compiles and not one_call and not suits_tiles(x_TD, weights, mean):
        load = [_rounded(count, mean, short, here) for count in load]
        size = weights.width * weights.hidden
        groups = _batches(load, size, step, here.call) if short else _neighbours(load, step)
        token_P, place_R, entry_P = _spread_rows(routing, groups)
    else:
        groups = _neighbours(load, step)
    order_R, start_T = routing.by_token
    return Plan(
        routing=routing.detach(),
        activation=weights.activation,
        interleaved=isinstance(weights, ExpertWeights) and weights.interleaved,
        hidden=weights.hidden,
        num_tokens=routing.num_tokens,
        token_P=token_P,
        place_R=place_R,
        entry_P=entry_P,
        order_R=order_R,
        row_R=order_R if place_R is None else place_R.index_select(0, order_R),
        start_T=None if routing.top_k is not None else start_T,
        groups=groups,
        one_call=one_call,
    )


def _compiles(x_TD: Tensor, multiply_adds: float, here: Tuning) -> bool:
    """Whether products of that size go to oneDNN, on a CPU."""
    if x_TD.device.type != "cpu" or x_TD.dtype.itemsize == 2:
        return x_TD.device.type == "cpu"
    least = min((one for one in (here.onednn, here.onednn_turned) if one is not None), default=None)
    return x_TD.dtype == torch.float32 and least is not None and multiply_adds >= least


def _rounded(count: int, mean: float, short: bool, here: Tuning) -> int:
    """A count that is at least as high, for loads of this mean, of 16 bits if ``short``."""
    near = short and _NEAR[0] * mean <= count <= _NEAR[1] * mean
    high = max(count if short else 2 * count, mean) / (here.steps_near if near else here.steps)
    unit = max(_LEAST, 1 << int(high).bit_length() >> 1)
    return -(-count // unit) * unit


def _neighbours(load: list[int], step: int) -> list[Group]:
    """Experts with entries in groups of at most ``step`` rows, an expert with more alone."""
    groups: list[Group] = []
    end = 0
    for expert, count in enumerate(load):
        if count == 0:
            continue
        if not groups or end + count - groups[-1].bound[0] > step:
            groups.append(Group([], [end], False))
        end += count
        groups[-1].experts.append(expert)
        groups[-1].bound.append(end)
    return groups


def _batches(load: list[int], size: int, step: int, call: int) -> list[Group]:
    """Experts alone, or neighbours with the same count where the rows that adds cost less than ``call`` each."""
    groups: list[Group] = []
    expert, end = 0, 0
    while expert < len(load):
        count, taken = load[expert], 1
        for many in _BATCHES if count else ():
            run = load[expert : expert + many]
            most = max(run)
            if len(run) == many and min(run) > 0 and most * many <= step:
                if (most * many - sum(run)) * size < call * (many - 1):
                    count, taken = most, many
                    break
        if count:
            bound = [end + i * count for i in range(taken + 1)]
            groups.append(Group([*range(expert, expert + taken)], bound, taken > 1))
            end = bound[-1]
        expert += taken
    return groups


def _spread_rows(routing: Routing, groups: list[Group]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the rows, rows of the entries, entries of the rows: each expert's last is repeated up to its count."""
    device, offset_E = routing.offset_E.device, routing.offset_E
    first = [0] * routing.num_experts
    round_ = [0] * routing.num_experts
    for group in groups:
        for expert, (start, end) in zip(group.experts, itertools.pairwise(group.bound), strict=True):
            first[expert], round_[expert] = start, end - start
    shift_E = torch.tensor(first, device=device) - offset_E[:-1]
    rows = groups[-1].bound[-1] if groups else 0
    experts = torch.arange(routing.num_experts, device=device)
    expert_P = torch.repeat_interleave(experts, torch.tensor(round_, device=device), output_size=rows)
    entry_P = torch.arange(rows, device=device).sub_(shift_E.index_select(0, expert_P))
    entry_P = torch.minimum(entry_P, (offset_E[1:] - 1).index_select(0, expert_P))
    place_R = torch.arange(routing.num_entries, device=device) + shift_E.index_select(0, routing.expert_R)
    return routing.token_R.index_select(0, entry_P), place_R, entry_P
