"""Feed-forward experts merged by a routing of sequences: parameters are averaged first, then one expert runs."""

import torch
from torch import Tensor

from turnout.errors import ShapeError, word
from turnout.run.low_rank import sound, taken
from turnout.run.reference import activate
from turnout.types import ExpertWeights, Routing
from turnout.types.invariant import refuse_invariant

__all__ = ["merged"]


def merged(x_TD: Tensor, routing: Routing, weights: ExpertWeights, sequence_T: Tensor) -> Tensor:
    """(T, D) each token through the one expert that averages its sequence's experts, weights and biases alike.

    theta_b = sum_e w_be theta_e for each sequence b. Per token it costs one expert, whatever E is; per sequence the
    averaging costs a multiplication for each parameter of the experts taken.

    Args:
        x_TD: (T, D).
        routing: of B rows, one for each sequence, over E experts; the gradient reaches its weights.
        weights: of the experts.
        sequence_T: (T,) int64, the sequence of each token, in [0, B).

    Raises:
        ShapeError: a size does not fit.

    >>> import torch
    >>> w = ExpertWeights(torch.ones(2, 1, 1), torch.tensor([[[2.0]], [[4.0]]]), activation="relu")
    >>> routing = Routing.from_dense(torch.tensor([[0.5, 0.5]]))
    >>> merged(torch.tensor([[1.0]]), routing, w, torch.tensor([0]))
    tensor([[3.]])

    Source: Muqeeth et al., 2023, "Soft Merging of Experts with Adaptive Routing".
    """
    if x_TD.shape != (len(sequence_T), weights.width) or routing.num_experts != weights.num_experts:
        got = f"{tuple(x_TD.shape)}, {len(sequence_T)} tokens, and a routing over {routing.num_experts} experts"
        allowed = f"be (T, {weights.width}), T, and over {weights.num_experts}"
        fix = "make the routing of these sequences, with a router of as many experts"
        raise ShapeError(word("x_TD and routing", got=got, allowed=allowed, where="turnout.run.merged", fix=fix))
    refuse_invariant("experts averaged for each sequence", "turnout.run.merged", "run one sequence at a time")
    batch = routing.num_tokens

    def mean(stack: Tensor) -> Tensor:
        return average(routing, stack.flatten(1)).view(batch, *stack.shape[1:])

    up_BDH, down_BFD = mean(weights.up_EDH), mean(weights.down_EFD)
    up_bias = None if weights.up_bias_EH is None else mean(weights.up_bias_EH)
    down_bias = None if weights.down_bias_ED is None else mean(weights.down_bias_ED)

    def run(x_BSD: Tensor, b: int | slice) -> Tensor:
        hidden = x_BSD @ up_BDH[b]
        hidden = hidden if up_bias is None else hidden + up_bias[b].unsqueeze(-2)
        y = activate(hidden, weights.activation, interleaved=weights.interleaved) @ down_BFD[b]
        return y if down_bias is None else y + down_bias[b].unsqueeze(-2)

    each = len(x_TD) // max(batch, 1)
    if torch.equal(sequence_T, torch.arange(batch, device=x_TD.device).repeat_interleave(each)):
        return run(x_TD.view(batch, each, weights.width), slice(None)).reshape(x_TD.shape)
    y_TD = torch.zeros_like(x_TD)
    for b in range(batch):  # sequences of different lengths
        (row_S,) = (sequence_T == b).nonzero(as_tuple=True)
        y_TD = y_TD.index_add(0, row_S, run(x_TD[row_S], b))
    return y_TD


def average(routing: Routing, stack_EX: Tensor) -> Tensor:
    """(B, X) the sum of what each row of the routing takes, with its weights.

    One that a row does not take is left out, not multiplied by 0, which would keep a NaN.
    """
    weight_BE = routing.dense().to(stack_EX.dtype)
    mean_BX = weight_BE @ stack_EX
    if not torch.compiler.is_compiling() and sound(mean_BX):
        return mean_BX
    taken_BE, mean_BX = taken(routing), torch.zeros_like(mean_BX)
    for e, one_X in enumerate(stack_EX):
        mean_BX = mean_BX + torch.where(taken_BE[:, e : e + 1], weight_BE[:, e : e + 1] * one_X, 0)
    return mean_BX
