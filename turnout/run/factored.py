"""Factored experts by a routing: what a group of experts shares is done once a token, the rest once an entry."""

import dataclasses

import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word
from turnout.run.invariant import invariant_experts
from turnout.run.product import linear
from turnout.run.reference import activate, reference
from turnout.types import ExpertWeights, FactoredWeights, Routing
from turnout.types.invariant import invariant_here

__all__ = ["factored", "factored_reference", "written_out"]


def written_out(weights: FactoredWeights) -> ExpertWeights:
    """The same experts with their matrices written out: L R + S for every one, in the dtype of the factors.

    Args:
        weights: the factors and rows.

    >>> import torch
    >>> none, up, down = torch.zeros(0, dtype=torch.int64), torch.ones(1, 2, 1), torch.ones(1, 1, 2)
    >>> w = FactoredWeights(
    ...     torch.ones(1, 1, 3), up, down, torch.ones(1, 3, 1), torch.tensor([1]), torch.ones(1, 3), none,
    ...     torch.zeros(0, 2), activation="relu",
    ... )
    >>> written_out(w).up_EDH[0].t()
    tensor([[1., 1., 1.],
            [2., 2., 2.]])

    Source: Li et al., 2023, "LoSparse": W = U V + S.
    """
    group_E = torch.arange(weights.num_experts, device=weights.up_rest_ND.device) // weights.share
    high, wide = weights.parts * weights.hidden, weights.width
    up_EHD = weights.up_rest_ND.new_zeros(weights.num_experts, high, wide)
    down_EDF = weights.up_rest_ND.new_zeros(weights.num_experts, wide, weights.hidden)
    if weights.up_in_GQD is not None and weights.up_out_EHr is not None:
        in_EPrD = weights.up_in_GQD[group_E].unflatten(1, (weights.parts, -1))
        up_EHD = (weights.up_out_EHr.unflatten(1, (weights.parts, -1)) @ in_EPrD).flatten(1, 2)
    if weights.down_in_ErF is not None and weights.down_out_GDr is not None:
        down_EDF = weights.down_out_GDr[group_E] @ weights.down_in_ErF
    up_EHD = up_EHD.flatten(0, 1).index_add(0, weights.up_row_N, weights.up_rest_ND).view_as(up_EHD)
    down_EDF = down_EDF.flatten(0, 1).index_add(0, weights.down_row_N, weights.down_rest_NF).view_as(down_EDF)
    biases = weights.up_bias_EH, weights.down_bias_ED
    return ExpertWeights(up_EHD.transpose(1, 2), down_EDF.transpose(1, 2), *biases, activation=weights.activation)


def factored_reference(x_TD: Tensor, routing: Routing, weights: FactoredWeights) -> Tensor:
    """(T, D) what ``reference`` makes of the experts written out: what ``factored`` must equal.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes.
        weights: the factors and rows.

    >>> import torch
    >>> none = torch.zeros(0, dtype=torch.int64)
    >>> w = FactoredWeights(
    ...     None, None, None, None, torch.tensor([0]), torch.ones(1, 3), torch.tensor([2]), torch.ones(1, 1),
    ...     activation="relu",
    ... )
    >>> routing = Routing.from_topk(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), num_experts=1)
    >>> factored_reference(torch.ones(1, 3), routing, w)
    tensor([[0., 0., 3.]])

    Source: none; the definition.
    """
    return reference(x_TD, routing, written_out(weights))


def factored(x_TD: Tensor, routing: Routing, weights: FactoredWeights) -> Tensor:
    """(T, D) each token's weighted sum of its experts' outputs, without writing any matrix out.

    What a group's shared factors make of a token, its latent, is made once for all of the group's experts that the
    token takes; on the way back the experts' latents are summed first and leave through the shared factor once.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes.
        weights: the factors and rows.

    Returns:
        (T, D) in x's dtype; tokens without entries are zero.

    Raises:
        ShapeError: the three do not fit each other.
        UsageError: the dtypes differ and autocast is off.

    >>> import torch
    >>> none = torch.zeros(0, dtype=torch.int64)
    >>> w = FactoredWeights(
    ...     torch.ones(1, 1, 3), torch.ones(2, 4, 1), torch.ones(2, 1, 4), torch.ones(1, 3, 1), none,
    ...     torch.zeros(0, 3), none, torch.zeros(0, 4), num_experts=2, share=2, activation="relu",
    ... )
    >>> routing = Routing.from_topk(torch.tensor([[0, 1]]), torch.full((1, 2), 0.5), num_experts=2)
    >>> factored(torch.ones(1, 3), routing, w)
    tensor([[12., 12., 12.]])

    Source: Liu et al., 2025, "Mixture of Latent Experts", for the shared factor; Li et al., 2023, "LoSparse", for the
    rows. The order of sums is ours.
    """
    dtype = x_TD.dtype
    x_TD, weights = _prepared(x_TD, routing, weights)
    if invariant_here("turnout.run.factored"):
        return invariant_experts(x_TD, routing, written_out(weights))
    run = torch.compiler.disable(_factored) if torch.compiler.is_compiling() else _factored
    with torch.autocast(x_TD.device.type, enabled=False):
        return run(x_TD, routing, weights).to(dtype)


def _factored(x_TD: Tensor, routing: Routing, weights: FactoredWeights) -> Tensor:
    y_TD = torch.zeros(x_TD.shape, dtype=torch.promote_types(x_TD.dtype, torch.float32), device=x_TD.device)
    bound_E = routing.offset_E.tolist()
    up_border_E = _borders(weights.up_row_N, weights.num_experts, weights.parts * weights.hidden)
    down_border_E = _borders(weights.down_row_N, weights.num_experts, weights.width)
    # Gradients of all that is trained are zeros, not missing, whatever the tokens took: processes that share a model
    # reduce them together, and wait for each other.
    y_TD = _touched(y_TD, x_TD, weights)
    for group in range(weights.groups):
        experts = range(group * weights.share, min((group + 1) * weights.share, weights.num_experts))
        start, end = bound_E[experts.start], bound_E[experts.stop]
        if start == end:
            continue
        token_U, place_R = _tokens(routing, start, end, len(experts))
        in_UD = x_TD[token_U]
        latent_UQ = None if weights.up_in_GQD is None else linear(in_UD, weights.up_in_GQD[group])
        out_UD, out_Ur = y_TD.new_zeros(len(token_U), x_TD.shape[1]), None
        for e in experts:
            rows = slice(bound_E[e] - start, bound_E[e + 1] - start)
            if rows.start == rows.stop:
                continue
            place_C = place_R[rows]
            weight_C1 = routing.weight_R[start:end][rows, None].to(y_TD.dtype)
            hidden_CH = _up(weights, e, in_UD, latent_UQ, place_C, slice(up_border_E[e], up_border_E[e + 1]))
            hidden_CF = activate(hidden_CH, weights.activation)
            if weights.down_in_ErF is not None:
                latent_Cr = linear(hidden_CF, weights.down_in_ErF[e]).to(y_TD.dtype) * weight_C1
                out_Ur = y_TD.new_zeros(len(token_U), latent_Cr.shape[1]) if out_Ur is None else out_Ur
                out_Ur = out_Ur.index_add(0, place_C, latent_Cr)
            extra_CD = _extra(weights, e, hidden_CF, slice(down_border_E[e], down_border_E[e + 1]))
            if extra_CD is not None:
                out_UD = out_UD.index_add(0, place_C, extra_CD.to(y_TD.dtype) * weight_C1)
        if out_Ur is not None and weights.down_out_GDr is not None:
            out_UD = out_UD + linear(out_Ur.to(x_TD.dtype), weights.down_out_GDr[group]).to(y_TD.dtype)
        y_TD = y_TD.index_add(0, token_U, out_UD)
    return y_TD


def _touched(y_TD: Tensor, x_TD: Tensor, weights: FactoredWeights) -> Tensor:
    """y, which no token of none adds anything to."""
    floating = [getattr(weights, field.name) for field in dataclasses.fields(weights)]
    floating = [x_TD, *(one for one in floating if isinstance(one, Tensor) and one.is_floating_point())]
    none = torch.cat(
        [one.flatten()[:0] for one in floating if one.requires_grad and one.numel()] or [y_TD.flatten()[:0]]
    )
    return y_TD.index_add(0, none.new_zeros(0, dtype=torch.int64), none.view(0, y_TD.shape[1]).to(y_TD.dtype))


def _up(
    weights: FactoredWeights, e: int, in_UD: Tensor, latent_UQ: Tensor | None, place_C: Tensor, rows: slice
) -> Tensor:
    """(C, H) what expert e's up matrix makes of its tokens."""
    if latent_UQ is None or weights.up_out_EHr is None:
        hidden_CH = in_UD.new_zeros(len(place_C), weights.parts * weights.hidden)
    else:
        pieces = zip(
            latent_UQ[place_C].chunk(weights.parts, 1), weights.up_out_EHr[e].chunk(weights.parts), strict=True
        )
        hidden_CH = torch.cat([linear(latent_Cr, out_Fr) for latent_Cr, out_Fr in pieces], 1)
    if rows.start < rows.stop:
        column_N = weights.up_row_N[rows] - e * hidden_CH.shape[1]
        hidden_CH = hidden_CH.index_add(1, column_N, linear(in_UD[place_C], weights.up_rest_ND[rows]))
    return hidden_CH if weights.up_bias_EH is None else hidden_CH + weights.up_bias_EH[e]


def _extra(weights: FactoredWeights, e: int, hidden_CF: Tensor, rows: slice) -> Tensor | None:
    """(C, D) what expert e's rows and bias add to its output; None for nothing."""
    extra_CD = None
    if rows.start < rows.stop:
        column_N = weights.down_row_N[rows] - e * weights.width
        extra_CD = hidden_CF.new_zeros(len(hidden_CF), weights.width)
        extra_CD = extra_CD.index_add(1, column_N, linear(hidden_CF, weights.down_rest_NF[rows]))
    if weights.down_bias_ED is not None:
        bias_CD = weights.down_bias_ED[e].expand(len(hidden_CF), -1)
        extra_CD = bias_CD if extra_CD is None else extra_CD + bias_CD
    return extra_CD


def _borders(row_N: Tensor, experts: int, rows: int) -> list[int]:
    """Where each expert's rows begin, and where the last one's end."""
    first_E = torch.arange(experts + 1, device=row_N.device) * rows
    return torch.searchsorted(row_N, first_E).tolist()


def _tokens(routing: Routing, start: int, end: int, experts: int) -> tuple[Tensor, Tensor]:
    """The tokens of these entries, once each, and for each entry which of them is its own."""
    token_R = routing.token_R[start:end]
    if experts == 1:
        return token_R, torch.arange(len(token_R), device=token_R.device)
    if start == 0 and end == len(routing.token_R):  # all groups in one: nearly every token takes part
        return torch.arange(routing.num_tokens, device=token_R.device), token_R
    token_U, place_R = torch.unique(token_R, return_inverse=True)
    return token_U, place_R


def _prepared(x_TD: Tensor, routing: Routing, weights: FactoredWeights) -> tuple[Tensor, FactoredWeights]:
    if x_TD.shape != (routing.num_tokens, weights.width) or routing.num_experts != weights.num_experts:
        got = f"{tuple(x_TD.shape)} and a routing of {routing.num_tokens} tokens over {routing.num_experts} experts"
        allowed = f"be (T, {weights.width}), and a routing of T tokens over {weights.num_experts} experts"
        fix = "take the routing from a router of this width and number of experts"
        raise ShapeError(word("x_TD and routing", got=got, allowed=allowed, where="turnout.run.factored", fix=fix))
    names = [field.name for field in dataclasses.fields(weights)]
    tensors = {name: tensor for name in names if isinstance(tensor := getattr(weights, name), Tensor)}
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        cast = {name: tensor.to(dtype) for name, tensor in floating.items()}
        return x_TD.to(dtype), dataclasses.replace(weights, **cast)  # pyrefly: ignore[bad-argument-type]
    if {tensor.dtype for tensor in floating.values()} != {x_TD.dtype}:
        got = ", ".join(sorted({str(tensor.dtype) for tensor in (x_TD, *floating.values())}))
        allowed, fix = "be the same unless autocast is on", "cast x, or run under torch.autocast"
        raise UsageError(word("the dtypes of x and factors", got=got, allowed=allowed, where="turnout.run", fix=fix))
    return x_TD, weights
