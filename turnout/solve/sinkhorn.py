"""Entropic transport: the plan nearest to given scores whose rows and columns have given sums."""

import torch
from torch import Tensor

from turnout.errors import UsageError, word

__all__ = ["sinkhorn"]


def sinkhorn(logit_TE: Tensor, *, temperature: float = 1.0, iterations: int = 100, tolerance: float = 1e-4) -> Tensor:
    """(T, E) exp(logit / temperature + u_t + v_e), the u and v being those with rows of sum 1 / T and columns of 1 / E.

    Rows and columns are scaled in turn, in logarithms, so nothing overflows. It ends after a scaling of the rows.

    Args:
        logit_TE: (T, E), finite.
        temperature: above 0; the higher, the more even; towards 0 the plan becomes a balanced assignment.
        iterations: how often at most, at least 1.
        tolerance: it ends early where the sums of the columns are within this share of what they are to be.

    Returns:
        The plan, in fp32 at least; no gradient goes through it.

    Raises:
        UsageError: a temperature, number or tolerance out of range.

    >>> plan_TE = sinkhorn(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), tolerance=1e-6)
    >>> [round(float(share), 4) for share in plan_TE.sum(0)], round(float(plan_TE[0, 0] / plan_TE[0].sum()), 4)
    ([0.5, 0.5], 0.6225)

    Source: Cuturi, 2013, "Sinkhorn Distances"; as a router Clark et al., 2022, "Unified Scaling Laws for Routed
    Language Models" (S-BASE).
    """
    if not (0 < temperature < float("inf") and iterations >= 1 and tolerance >= 0):
        got, allowed = f"{temperature}, {iterations} and {tolerance}", "be above 0, at least 1, and not negative"
        where, fix = "turnout.solve.sinkhorn", "pass temperature=1.0, iterations=100 and tolerance=1e-4"
        raise UsageError(word("temperature, iterations and tolerance", got=got, allowed=allowed, where=where, fix=fix))
    with torch.no_grad():
        plan_TE = logit_TE.detach().to(torch.promote_types(logit_TE.dtype, torch.float32)) / temperature
        rows, columns = plan_TE.shape
        if not rows:
            return plan_TE
        for _ in range(iterations):
            plan_TE = plan_TE - plan_TE.logsumexp(0, keepdim=True)  # columns of sum 1
            plan_TE = plan_TE - plan_TE.logsumexp(1, keepdim=True)  # rows of sum 1
            share_E = plan_TE.exp().sum(0) * (columns / rows)
            if float((share_E - 1).abs().max()) <= tolerance:
                break
        return plan_TE.exp() / rows
