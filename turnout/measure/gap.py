"""How far two tensors, and two routings, are apart, row by row."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from turnout.types import Routing

__all__ = ["LogitGap", "RouteGap", "logit_gap", "rename", "route_gap", "row_gap", "same_bits", "usable"]

# How many numbers are widened to double precision at a time.
_PIECE = 1 << 22


@dataclasses.dataclass(frozen=True, eq=False)
class LogitGap:
    """For every position: relative distance, largest absolute difference, KL divergence, whether the top agrees.

    ``told_a_N`` and ``told_b_N`` are the positions where the two give numbers at all, see ``usable``.
    """

    relative_N: Tensor
    abs_N: Tensor
    kl_N: Tensor
    same_N: Tensor
    told_a_N: Tensor
    told_b_N: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class RouteGap:
    """For every token: whether its experts changed, and how far its weights are apart, at least 1 where they did.

    ``lost_T`` is the highest score, in A, of an expert it lost, ``won_T`` the lowest of one it won; None when A keeps
    no scores.
    """

    changed_T: Tensor
    relative_T: Tensor
    lost_T: Tensor | None = None
    won_T: Tensor | None = None

    @property
    def margin(self) -> float | None:
        """The largest lead that a lost expert had over a won one."""
        if self.lost_T is None or self.won_T is None:
            return None
        lead = (self.lost_T - self.won_T)[self.changed_T]
        return float(lead[lead.isfinite()].max()) if bool(lead.isfinite().any()) else None

    def tied_T(self, bound: float) -> Tensor:
        """(T,) bool, the tokens that changed experts whose scores are no further apart than the bound."""
        if self.lost_T is None or self.won_T is None:
            return torch.zeros_like(self.changed_T)
        return self.changed_T & (self.won_T <= self.lost_T) & (self.lost_T - self.won_T <= bound * self.lost_T)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits: zeros of another sign differ, the same nan does not."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits_a, bits_b = (tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(bits_a, bits_b)


def usable(logits_NV: Tensor) -> Tensor:
    """(N,) bool, the rows that say something: at least one finite number, and beside finite ones only -inf.

    -inf says that a token is impossible, as models mask padding of their vocabulary; nan and +inf say nothing, and two
    rows of them are no more equal than two answers that were never given.
    """
    told_N = [
        row.isfinite().any(1) & (row.isfinite() | (row == -torch.inf)).all(1)
        for row in logits_NV.split(max(1, _PIECE // max(logits_NV.shape[1], 1)))
    ]
    return torch.cat(told_N) if told_N else torch.zeros(0, dtype=torch.bool)


def row_gap(a_ND: Tensor, b_ND: Tensor, *, centred: bool = False) -> Tensor:
    """(N,) float64, |b - a| of each row relative to |a|, or to the median |a| of all rows where that is larger.

    The median keeps rows that happen to be small from looking far apart; a row that is itself large counts by its own
    size, so that the one huge token that many models have hides nothing. Equal rows are 0 apart, also where they are
    infinite; a difference that is not finite is infinite.

    Args:
        a_ND: (N, D).
        b_ND: (N, D).
        centred: measure the size of a without the mean of its row: softmax does not see a constant.
    """
    apart, size = [], []
    for a, b in _pieces(a_ND, b_ND):
        apart.append(_apart(a, b).norm(dim=1))
        finite = torch.where(a.isfinite(), a, 0.0)
        size.append((finite - finite.mean(1, keepdim=True) if centred else finite).norm(dim=1))
    apart_N, size_N = torch.cat(apart), torch.cat(size)
    if not len(apart_N):
        return apart_N
    relative_N = apart_N / torch.maximum(size_N, size_N.median())
    return torch.where(apart_N == 0, 0.0, relative_N.nan_to_num(nan=torch.inf, posinf=torch.inf))


def logit_gap(a_BSV: Tensor, b_BSV: Tensor) -> LogitGap:
    """The four distances between logits, at every position in row order."""
    a_NV, b_NV = a_BSV.flatten(0, 1).cpu(), b_BSV.flatten(0, 1).cpu()
    most, divergence, same = [], [], []
    for a, b in _pieces(a_NV, b_NV):
        most.append(_apart(a, b).amax(1))
        log_a, log_b = a.log_softmax(1), b.log_softmax(1)
        # Where A gives no probability the term is 0, whatever B gives.
        term = torch.where(log_a == -torch.inf, 0.0, log_a.exp() * (log_a - log_b)).sum(1)
        equal = (a == b).all(1)
        divergence.append(torch.where(equal, 0.0, term.clamp(min=0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)))
        same.append(a.argmax(1) == b.argmax(1))
    told_a_N, told_b_N = usable(a_NV), usable(b_NV)
    told_N = told_a_N & told_b_N
    parts = (row_gap(a_NV, b_NV, centred=True), torch.cat(most), torch.cat(divergence))
    # Two infinities are no distance of 0 where no number stands behind them.
    far = [torch.where(told_N, part_N, torch.inf) for part_N in parts]
    return LogitGap(far[0], far[1], far[2], torch.cat(same) & told_N, told_a_N, told_b_N)


def _apart(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a == b, 0.0, b - a).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)


def _pieces(a_ND: Tensor, b_ND: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(1, _PIECE // max(a_ND.shape[1], 1))
    for a, b in zip(a_ND.split(step), b_ND.split(step), strict=True):
        yield a.double(), b.double()


# ---- routings


def route_gap(a: Routing, b: Routing, name_E: Tensor) -> RouteGap:
    """How two decisions over the same tokens and as many experts differ.

    Args:
        a: the first.
        b: the second.
        name_E: (E,) the number in b of each expert of a.
    """
    weight_a, weight_b = a.dense().double(), b.dense().double()[:, name_E]
    chosen_a, chosen_b = chosen(a), chosen(b)[:, name_E]
    relative_T = row_gap(weight_a, weight_b)
    changed_T = (chosen_a != chosen_b).any(1)
    relative_T = torch.where(changed_T, relative_T.clamp(min=1.0), relative_T)
    if a.score_TE is None:
        return RouteGap(changed_T, relative_T)
    score_TE = a.score_TE.double()
    lost_T = torch.where(chosen_a & ~chosen_b, score_TE, -torch.inf).amax(1)
    won_T = torch.where(chosen_b & ~chosen_a, score_TE, torch.inf).amin(1)
    return RouteGap(changed_T, relative_T, lost_T, won_T)


def chosen(routing: Routing) -> Tensor:
    """(T, E) bool, the pattern of the decision."""
    mask_TE = torch.zeros(routing.num_tokens, routing.num_experts, dtype=torch.bool)
    mask_TE[routing.token_R, routing.expert_R] = True
    return mask_TE


def rename(a: list[Routing], b: list[Routing], bound: float) -> Tensor:
    """(E,) the number in B of each expert of A: the same, unless another numbering makes fewer tokens differ.

    The other numbering is the assignment that gives most weight to what both decided for the same tokens.
    """
    from scipy.optimize import linear_sum_assignment

    experts = a[0].num_experts
    same_E = torch.arange(experts)
    left = _unlike(a, b, same_E, bound)
    if left == 0:
        return same_E
    both_EE = torch.zeros(experts, experts, dtype=torch.float64)
    for one, other in zip(a, b, strict=True):
        both_EE += one.dense().double().t() @ other.dense().double()
    both_EE = both_EE.nan_to_num() * (1 + 1e-9 * torch.eye(experts))
    name_E = torch.from_numpy(linear_sum_assignment(both_EE.numpy(), maximize=True)[1]).long()
    return name_E if _unlike(a, b, name_E, bound) < left else same_E


def _unlike(a: list[Routing], b: list[Routing], name_E: Tensor, bound: float) -> int:
    gaps = [route_gap(one, other, name_E) for one, other in zip(a, b, strict=True)]
    return sum(int((gap.changed_T | (gap.relative_T > bound)).sum()) for gap in gaps)
