"""Low-rank maps by a routing: the sum over a token's maps, at the cost of the maps that it takes."""

import functools
import math
from itertools import pairwise

import torch
from torch import Tensor

from turnout.errors import ShapeError, word
from turnout.run.composed import transformed
from turnout.run.product import linear, product
from turnout.run.workspace import room
from turnout.types import Routing
from turnout.types.invariant import refuse_invariant
from turnout.types.low_rank import LowRankWeights

__all__ = ["low_rank", "low_rank_merged", "low_rank_reference"]

# Gathering a token and adding its result cost about as much as this many ranks of product, and with gradients as this
# many; measured on a CPU with D = O = 1024 (docs/performance.md). It only decides between two ways of computing the
# same sum.
_GATHER, _GATHER_TRAINING = 50, 600
# Below this many rows per map one call for all maps is faster than two for each.
_FEW = 8


def low_rank_reference(x_TD: Tensor, routing: Routing, weights: LowRankWeights) -> Tensor:
    """(T, O) the obvious loop: y[t] = sum over entries r of t of weight_R[r] * scale_n * (x[t] @ A_n.T) @ B_n.T.

    Args:
        x_TD: (T, D).
        routing: of T tokens over N maps.
        weights: their factors.

    >>> import torch
    >>> w = LowRankWeights(torch.ones(1, 2), torch.ones(1, 3), (0, 1), (2.0,))
    >>> routing = Routing.from_topk(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), num_experts=1)
    >>> low_rank_reference(torch.tensor([[1.0, 2.0]]), routing, w)
    tensor([[6., 6., 6.]])

    Source: Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """
    _check(x_TD, routing, weights)
    rows = []
    for t in range(routing.num_tokens):
        row_O = x_TD.new_zeros(weights.out)
        for r in (routing.token_R == t).nonzero()[:, 0].tolist():
            n = int(routing.expert_R[r])
            a, b = weights.border_N[n], weights.border_N[n + 1]
            y_O = (x_TD[t] @ weights.down_RD[a:b].t()) @ weights.up_RO[a:b]
            row_O = row_O + routing.weight_R[r].to(x_TD.dtype) * weights.scale_N[n] * y_O
        rows.append(row_O)
    return torch.stack(rows) if rows else x_TD.new_zeros(0, weights.out)


def low_rank(x_TD: Tensor, routing: Routing, weights: LowRankWeights) -> Tensor:
    """(T, O) what ``low_rank_reference`` gives; tokens that take few of the maps pay for those alone.

    Where most maps are taken by most tokens it is two products with all factors, the weights between them; else the
    rows of each map are gathered, sent through its own two slices, and added up.

    Args:
        x_TD: (T, D) of the factors' dtype.
        routing: of T tokens over N maps; the gradient reaches its weights.
        weights: their factors.

    Raises:
        ShapeError: x, routing and weights do not fit each other.

    >>> import torch
    >>> w = LowRankWeights(torch.ones(1, 2), torch.ones(1, 3), (0, 1), (2.0,))
    >>> routing = Routing.from_topk(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), num_experts=1)
    >>> low_rank(torch.tensor([[1.0, 2.0]]), routing, w)
    tensor([[6., 6., 6.]])

    Source: Hu et al., 2021, "LoRA"; the gathering as Gale et al., 2022, "MegaBlocks". We choose between the two by
    what the products and the gathering cost.
    """
    _check(x_TD, routing, weights)
    refuse_invariant("low-rank maps", "turnout.run.low_rank", "merge the adapters into the model first")
    trains = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x_TD, routing.weight_R, weights.down_RD, weights.up_RO)
    )
    looks = x_TD.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()
    gather = _chosen if looks and not trains else _gathered
    if pays(routing, weights, trains=trains) or (looks and trains and not sound(weights.down_RD, weights.up_RO)):
        return gather(x_TD, routing, weights)
    y_TO = _whole(x_TD, routing, weights, looked=looks)
    return gather(x_TD, routing, weights) if looks and not trains and not sound(y_TO) else y_TO


def _whole(x_TD: Tensor, routing: Routing, weights: LowRankWeights, *, looked: bool) -> Tensor:
    """Two products with all factors. What a token does not take is cut off, not multiplied by 0, which keeps a NaN.

    Where nobody looks whether all is finite (a GPU would have to wait for the answer), rows of factors that are not are
    left out of the products, and the tokens that take them are NaN.
    """
    down_RD, up_RO = weights.down_RD, weights.up_RO
    rank_N = torch.tensor(weights.rank_N, device=x_TD.device)
    scale_N = torch.tensor(weights.scale_N, device=x_TD.device, dtype=routing.weight_R.dtype)

    def spread(value_TN: Tensor) -> Tensor:
        return value_TN.repeat_interleave(rank_N, dim=1, output_size=weights.border_N[-1])

    taken_TR, bad_R = spread(taken(routing)), None
    if not looked:
        bad_R = ~(down_RD.isfinite().all(1) & up_RO.isfinite().all(1))
        down_RD, up_RO = (factor.masked_fill(bad_R.unsqueeze(1), 0) for factor in (down_RD, up_RO))
    hidden_TR = linear(x_TD, down_RD).masked_fill(~taken_TR, 0)
    y_TO = linear(hidden_TR * spread(routing.dense() * scale_N).to(x_TD.dtype), up_RO.t())
    return y_TO if bad_R is None else y_TO.masked_fill((taken_TR & bad_R).any(1, keepdim=True), math.nan)


def taken(routing: Routing) -> Tensor:
    """(T, N) bool, which token takes which map: the pattern, whatever the weights."""
    taken_TN = torch.zeros(routing.num_tokens, routing.num_experts, dtype=torch.bool, device=routing.token_R.device)
    return taken_TN.index_put((routing.token_R, routing.expert_R), torch.ones_like(routing.token_R, dtype=torch.bool))


def sound(*stacks: Tensor) -> bool:
    """Whether all numbers are finite, so that what is multiplied by 0 is gone. A sum that overflows says no as well."""
    with torch.no_grad():
        total = sum(stack.sum(dtype=torch.promote_types(stack.dtype, torch.float32)) for stack in stacks)
    return math.isfinite(float(total))


def pays(routing: Routing, weights: LowRankWeights, *, trains: bool) -> bool:
    """Whether so few of the maps are taken that gathering their tokens costs less than all products."""
    total = weights.border_N[-1]
    each = total / weights.num_paths + (_GATHER_TRAINING if trains else _GATHER)
    return routing.num_entries * each < routing.num_tokens * total


def _gathered(x_TD: Tensor, routing: Routing, weights: LowRankWeights) -> Tensor:
    """The rows of each map, sent through its own two slices; differentiable."""
    weight_R = routing.weight_R.to(x_TD.dtype)
    x_RD = x_TD.index_select(0, routing.token_R)
    parts, start = [], 0
    for load, scale, (a, b) in zip(routing.load_E.tolist(), weights.scale_N, pairwise(weights.border_N), strict=True):
        if not load:
            continue
        rows = slice(start, start + load)
        hidden = x_RD[rows] @ weights.down_RD[a:b].t()
        parts.append((hidden * (weight_R[rows, None] * scale)) @ weights.up_RO[a:b])
        start += load
    if not parts:
        return x_TD.new_zeros(x_TD.shape[0], weights.out)
    return x_TD.new_zeros(x_TD.shape[0], weights.out).index_add(0, routing.token_R, torch.cat(parts))


def _chosen(x_TD: Tensor, routing: Routing, weights: LowRankWeights) -> Tensor:
    """The same without gradients, on a CPU: a token's result is one weighted sum of rows of ``up``, nothing added up.

    No array of R rows of width O is ever made, and none of width D where maps have many rows: those of one map at a
    time stay in the cache. Fresh memory for them costs several times what all products do.
    """
    index_Nr, equal, scale_N = _table(weights.border_N, weights.scale_N)
    rank = index_Nr.shape[1]
    hidden_Rr = _hidden(x_TD, routing, weights, rank if equal else None)
    scale = weights.scale_N[0]
    if scale_N is not None:
        hidden_Rr.mul_((routing.weight_R * scale_N.index_select(0, routing.expert_R)).unsqueeze(1))
    else:
        hidden_Rr.mul_((routing.weight_R if scale == 1 else routing.weight_R * scale).unsqueeze(1))
    order_R, start_T = routing.by_token
    index_Rr = index_Nr.index_select(0, routing.expert_R.index_select(0, order_R))
    hidden_Rr = hidden_Rr.index_select(0, order_R)
    bags = index_Rr.view(-1), start_T * rank, False, 0, False, hidden_Rr.view(-1), True
    return torch.embedding_bag(weights.up_RO, *bags)[0]


@functools.lru_cache(maxsize=64)
def _table(border_N: tuple[int, ...], scale_N: tuple[float, ...]) -> tuple[Tensor, bool, Tensor | None]:
    """Rows of the factors (N, r), a map's last one again where it has fewer; whether none has; scales that differ."""
    most = max(b - a for a, b in pairwise(border_N))
    with torch.inference_mode(False):
        rows = [[min(row, b - 1) for row in range(a, a + most)] for a, b in pairwise(border_N)]
        index_Nr = torch.tensor(rows, device="cpu")
        scales = torch.tensor(scale_N, dtype=torch.float32, device="cpu") if len(set(scale_N)) > 1 else None
    return index_Nr, all(b - a == most for a, b in pairwise(border_N)), scales


def _hidden(x_TD: Tensor, routing: Routing, weights: LowRankWeights, rank: int | None) -> Tensor:
    """(R, r) each entry's token through the first factor of its map, zero beyond that map's rank."""
    rows, count, size = routing.num_entries, weights.num_paths, x_TD.element_size()
    grouped = rank and 0 < rows < _FEW * count and size <= 4 and not (weights.width * size % 16 or rank * size % 16)
    bound = routing.bounds()
    if grouped:
        stack_NDr = weights.down_RD.reshape(count, rank, weights.width).transpose(1, 2)
        end_N = routing.offset_E[1:].to(torch.int32)
        return torch.nn.functional.grouped_mm(x_TD.index_select(0, routing.token_R), stack_NDr, offs=end_N)
    most = rank or max(weights.rank_N)
    hidden_Rr = x_TD.new_empty(rows, most) if rank else x_TD.new_zeros(rows, most)
    buffer = room((max(b - a for a, b in pairwise(bound)), weights.width), x_TD.dtype, x_TD.device)
    for (start, end), (a, b) in zip(pairwise(bound), pairwise(weights.border_N), strict=True):
        if start < end:
            x_MD = torch.index_select(x_TD, 0, routing.token_R[start:end], out=buffer[: end - start])
            product(x_MD, weights.down_RD[a:b].t(), out_MN=hidden_Rr[start:end, : b - a])
    return hidden_Rr


def low_rank_merged(
    x_TD: Tensor, routing: Routing, weights: LowRankWeights, sequence_T: Tensor, *, parts: int = 1
) -> Tensor:
    """(T, O) each token through the *merged* map of its sequence: the factors are averaged first, then applied.

    With w the weights of sequence b, A_b = sum_n w_n A_n and B_b = sum_n w_n scale_n B_n; y = B_b A_b x. With more than
    one part, the columns of A and the rows of B are cut into that many equal parts, each averaged with a row of weights
    of its own. Ranks may differ: the shorter factors count as filled with zeros.

    Args:
        x_TD: (T, D).
        routing: of B * parts rows over N maps, those of a sequence next to each other.
        weights: their factors.
        sequence_T: (T,) int64, the sequence of each token, in [0, B).
        parts: how many, at least 1; a divisor of D and of O.

    Raises:
        ShapeError: a size does not fit.

    >>> import torch
    >>> w = LowRankWeights(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [1.0]]), (0, 1, 2), (1.0, 1.0))
    >>> routing = Routing.from_dense(torch.tensor([[0.5, 0.5]]))
    >>> low_rank_merged(torch.tensor([[1.0]]), routing, w, torch.tensor([0]))
    tensor([[2.]])

    Source: Ponti et al., 2022, "Combining Modular Skills in Multitask Learning"; the parts: Caccia et al., 2023,
    "Multi-Head Adapter Routing for Cross-Task Generalization".
    """
    refuse_invariant("low-rank maps", "turnout.run.low_rank_merged", "merge the adapters into the model first")
    batch, left = divmod(routing.num_tokens, max(parts, 1))
    fits = parts > 0 and not left and not weights.width % parts and not weights.out % parts
    fits = fits and x_TD.shape == (len(sequence_T), weights.width) and routing.num_experts == weights.num_paths
    if not fits:
        got = f"{tuple(x_TD.shape)}, {routing.num_tokens} rows over {routing.num_experts} maps, {parts} parts"
        allowed = (
            f"be (T, {weights.width}), rows over {weights.num_paths} maps for every part of every sequence, and a "
        )
        allowed += f"divisor of {weights.width} and {weights.out}"
        fix = "pass a routing of the sequences, and as many parts as divide both sizes"
        where = "turnout.run.low_rank_merged"
        raise ShapeError(word("x_TD, routing and parts", got=got, allowed=allowed, where=where, fix=fix))
    scale_N = torch.tensor(weights.scale_N, device=x_TD.device, dtype=x_TD.dtype)
    down_BrD = _averaged(routing, None, padded(weights.down_RD, weights), parts)
    up_BrO = _averaged(routing, scale_N, padded(weights.up_RO, weights), parts)
    each = len(x_TD) // max(batch, 1)
    if torch.equal(sequence_T, torch.arange(batch, device=x_TD.device).repeat_interleave(each)):
        x_BSD = x_TD.view(batch, each, weights.width)
        return ((x_BSD @ down_BrD.transpose(1, 2)) @ up_BrO).view(len(x_TD), weights.out)
    hidden_Tr = torch.einsum("td,trd->tr", x_TD, down_BrD[sequence_T])
    return torch.einsum("tr,tro->to", hidden_Tr, up_BrO[sequence_T])


def _averaged(routing: Routing, scale_N: Tensor | None, factor_NrX: Tensor, parts: int) -> Tensor:
    """(B, r, X) the factors of each sequence, part by part: the sum of those that it takes, with their weights."""
    part_NrSY = factor_NrX.unflatten(2, (parts, -1))
    weight_BSN = routing.dense().to(factor_NrX.dtype).unflatten(0, (-1, parts))
    weight_BSN = weight_BSN if scale_N is None else weight_BSN * scale_N
    mean_BrSY = torch.einsum("bsn,nrsy->brsy", weight_BSN, part_NrSY)
    if not torch.compiler.is_compiling() and sound(mean_BrSY):
        return mean_BrSY.flatten(2)
    taken_BSN = taken(routing).unflatten(0, (-1, parts))
    total_BrSY = factor_NrX.new_zeros(len(weight_BSN), factor_NrX.shape[1], *part_NrSY.shape[2:])
    for n, part_rSY in enumerate(part_NrSY):  # one that is not taken is left out, not multiplied by 0
        taken_B1S1, weight_B1S1 = (of[:, None, :, n, None] for of in (taken_BSN, weight_BSN))
        total_BrSY = total_BrSY + torch.where(taken_B1S1, weight_B1S1 * part_rSY, 0)
    return total_BrSY.flatten(2)


def merge(weights: LowRankWeights, weight_SN: Tensor) -> LowRankWeights:
    """One map whose factors are the average of all, part by part: what ``low_rank_merged`` applies to a sequence."""
    parts = len(weight_SN)
    scale_N = weight_SN.new_tensor(weights.scale_N)
    down_NrSD = padded(weights.down_RD, weights).unflatten(2, (parts, -1))
    up_NrSO = padded(weights.up_RO, weights).unflatten(2, (parts, -1))
    down_rD = torch.einsum("sn,nrsd->rsd", weight_SN, down_NrSD).flatten(1)
    up_rO = torch.einsum("sn,nrso->rso", weight_SN * scale_N, up_NrSO).flatten(1)
    return LowRankWeights(down_rD, up_rO, (0, len(down_rD)), (1.0,))


def padded(factor_RX: Tensor, weights: LowRankWeights) -> Tensor:
    """(N, r, X) the factors of each map, those of lower rank than the largest filled with zeros."""
    most = max(weights.rank_N)
    if all(rank == most for rank in weights.rank_N):
        return factor_RX.view(weights.num_paths, most, -1)
    slices = [factor_RX[a:b] for a, b in pairwise(weights.border_N)]
    return torch.stack([torch.nn.functional.pad(part, (0, 0, 0, most - len(part))) for part in slices])


def _check(x_TD: Tensor, routing: Routing, weights: LowRankWeights) -> None:
    if x_TD.shape != (routing.num_tokens, weights.width) or routing.num_experts != weights.num_paths:
        got = f"{tuple(x_TD.shape)} and a routing of {routing.num_tokens} tokens over {routing.num_experts} maps"
        allowed = f"be (T, {weights.width}), and a routing of T tokens over {weights.num_paths} maps"
        fix = "make the routing from these tokens, with a router of as many experts as there are maps"
        raise ShapeError(word("x_TD and routing", got=got, allowed=allowed, where="turnout.run.low_rank", fix=fix))
