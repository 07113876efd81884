"""torch's own grouped matrix product over rows sorted by expert."""

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.errors import UsageError, word
from turnout.run.reference import activate, as_reference, prepare, uncompiled
from turnout.run.slots import Slots
from turnout.types import ExpertWeights, Routing

__all__ = ["grouped", "grouped_slots"]


@uncompiled
@as_reference
def grouped(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Each token's weighted sum of its experts' outputs, by two grouped products over rows sorted by expert.

    The product wants every stride to be a multiple of 16 bytes; widths that are not are padded with zeros, which
    copies the weights.

    Args:
        x_TD: (T, D), the tokens, in fp32, bf16 or fp16.
        routing: which experts each takes, and with what weight.
        weights: the experts.

    Returns:
        (T, D) in x's dtype; tokens without entries are zero.

    Raises:
        ShapeError: the three do not fit each other.
        UsageError: their dtypes differ and autocast is off, or torch's product does not know the dtype (fp64).

    >>> import torch
    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> weights = ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 4, 3), activation="relu")
    >>> grouped(torch.ones(1, 3), routing, weights)
    tensor([[6., 6., 6.]])

    Source: the grouped product of torch.nn.functional.grouped_mm; dispatch as in Gale et al., 2022, "MegaBlocks".
    """
    return _grouped(x_TD, routing, weights, None)


def grouped_slots(x_TD: Tensor, routing: Routing, slots: Slots) -> Tensor:
    """(T, D) likewise of experts that come into slots, with the bits of those that are all in memory; no gradients.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes, and with what weight.
        slots: the experts.

    >>> weights = ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 4, 3), activation="relu")
    >>> slots = Slots(weights, weights, limit=1, take=lambda experts, more: experts)
    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> grouped_slots(torch.ones(1, 3), routing, slots)
    tensor([[6., 6., 6.]])

    Source: none; our own.
    """
    return _grouped(x_TD, routing, slots.whole, slots)


def _grouped(x_TD: Tensor, routing: Routing, weights: ExpertWeights, slots: Slots | None) -> Tensor:
    dtype = x_TD.dtype
    x_TD, weights = prepare(x_TD, routing, weights, cast_weights=slots is None)
    if x_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(
            word(
                "the dtype",
                got=str(x_TD.dtype),
                allowed="be float32, bfloat16 or float16",
                where="turnout.run.grouped",
                fix="pass backend='sort', which takes any floating dtype",
            )
        )
    with torch.autocast(x_TD.device.type, enabled=False):
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        y_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
        if routing.num_entries == 0:
            # torch's product refuses to take no rows; zero times everything keeps the gradients' zeros.
            stacks = weights.up_EDH, weights.down_EFD, weights.up_bias_EH, weights.down_bias_ED
            nothing = x_TD.sum() + routing.weight_R.sum()
            for stack in stacks:
                nothing = nothing if stack is None else nothing + stack.sum()
            return (y_TD + 0 * nothing).to(dtype)
        end_E = _ends(routing)
        hidden_RH = _all(x_TD.index_select(0, routing.token_R), weights.up_EDH, end_E, slots)
        if weights.up_bias_EH is not None:
            hidden_RH = hidden_RH + weights.up_bias_EH.index_select(0, routing.expert_R)
        active_RF = activate(hidden_RH, weights.activation, interleaved=weights.interleaved)
        out_RD = _all(active_RF, weights.down_EFD, end_E, slots)
        if weights.down_bias_ED is not None:
            out_RD = out_RD + weights.down_bias_ED.index_select(0, routing.expert_R)
        out_RD = out_RD.to(wide) * routing.weight_R[:, None].to(wide)
        return y_TD.index_add(0, routing.token_R, out_RD).to(dtype)


def _ends(routing: Routing) -> Tensor:
    """(E,) int32, where each expert's rows end; torch's product believes anything, so on a CPU they are looked at."""
    if routing.offset_E.device.type == "cpu":
        routing.bounds()
    return routing.offset_E[1:].to(torch.int32)


def _all(rows: Tensor, stack: Tensor, end_E: Tensor, slots: Slots | None) -> Tensor:
    """Rows times the stack; where experts come into slots, as many at a time as fit."""
    if slots is None:
        return _product(rows, stack, end_E)
    out, bound = rows.new_empty(len(rows), stack.shape[2]), [0, *end_E.tolist()]
    experts = [expert for expert in range(len(stack)) if bound[expert] < bound[expert + 1]]
    for place, _ in slots.some(experts):
        some = experts[place]
        part = slice(bound[some[0]], bound[some[-1] + 1])
        ends = torch.tensor([bound[expert + 1] - part.start for expert in some], dtype=torch.int32)
        out[part] = _product(rows[part], slots.gathered(stack, some).to(rows.dtype), ends)
    return out


def _product(rows: Tensor, stack: Tensor, end_E: Tensor) -> Tensor:
    """Rows (R, I) times stack (E, I, O), each group of rows with its own matrix; I and O padded where they must be."""
    inside, outside = stack.shape[1:]
    unit = 16 // rows.element_size()
    pad_in, pad_out = -inside % unit, -outside % unit
    if pad_in or pad_out:
        rows = F.pad(rows, (0, pad_in))
        stack = F.pad(stack, (0, pad_out, 0, pad_in))
    aligned = all(stride * stack.element_size() % 16 == 0 for stride in stack.stride() if stride != 1)
    (_, high, wide), (_, down, across) = stack.shape, stack.stride()
    apart = (across == 1 and down >= wide) or (down == 1 and across >= high)  # not one row for all, nor windows
    stack = stack if aligned and apart else stack.contiguous()
    return F.grouped_mm(rows.contiguous(), stack, offs=end_E)[:, :outside]
