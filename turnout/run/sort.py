"""Sorted dispatch: rows gathered expert by expert, one pair of products per expert, results summed per token."""

import torch
from torch import Tensor

from turnout.run.reference import activate, prepare, uncompiled
from turnout.types import ExpertWeights, Routing

__all__ = ["sort"]


@uncompiled
def sort(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Each token's weighted sum of its experts' outputs, by one product per expert over rows sorted by expert.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes, and with what weight.
        weights: the experts.

    Returns:
        (T, D) in x's dtype; tokens without entries are zero.

    Raises:
        ShapeError: the three do not fit each other.
        UsageError: their dtypes differ and autocast is off.

    >>> import torch
    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> weights = ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 4, 3), activation="relu")
    >>> sort(torch.ones(1, 3), routing, weights)
    tensor([[6., 6., 6.]])

    Source: Gale et al., 2022, "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", the dropless form.
    """
    dtype = x_TD.dtype
    x_TD, weights = prepare(x_TD, routing, weights)
    with torch.autocast(x_TD.device.type, enabled=False):
        part = x_TD.index_select(0, routing.token_R).split(routing.load_E.tolist())
        up, down = weights.up_EDH.unbind(0), weights.down_EFD.unbind(0)
        out = []
        for e, rows in enumerate(part):
            hidden = rows @ up[e]
            if weights.up_bias_EH is not None:
                hidden = hidden + weights.up_bias_EH[e]
            out.append(activate(hidden, weights.activation) @ down[e])
            if weights.down_bias_ED is not None:
                out[-1] = out[-1] + weights.down_bias_ED[e]
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        out_RD = torch.cat(out).to(wide) * routing.weight_R[:, None].to(wide)
        y_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device).index_add(0, routing.token_R, out_RD)
        return y_TD.to(dtype)
