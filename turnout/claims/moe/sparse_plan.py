"""Claim: the sparse plan's value is the linear program's at k = 1, it never has more than k entries, and it is even."""

import numpy as np
import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.moe.clustered import WIDTH, max_vio
from turnout.decide.token import SparseTransport
from turnout.solve.transport import transport
from turnout.solve.transport_sparse import transport_sparse

_TOKENS, _EXPERTS, _K = 256, 8, 2


def sparse_plan() -> Claim:
    """The semi-dual against the assignment's cost, entries a token, and the loads of the router's plan.

    >>> sparse_plan().off
    'any number of entries; no steps of the solver'

    Source: Liu, Puigcerver & Blondel, 2023, "Sparsity-Constrained Optimal Transport", sections 4 and 6.
    """
    return Claim(
        name="sparse_plan",
        statement="A plan with a bound on each column's entries is the exact assignment at one entry, never has more "
        "than are allowed, and evens the loads.",
        source="Liu et al., 2023, Sparsity-Constrained Optimal Transport",
        off="any number of entries; no steps of the solver",
        switched={"gap": "gap, 2", "over": "over, any", "vio": "vio, none"},
        rows=(
            Row("semi-dual away from the assignment's cost", "within", "gap", "gap, 2", "two entries", bound=1e-6),
            Row("entries a token over 2", "within", "over", "over, any", "any number of entries", bound=1e-9),
            Row("MaxVio of the router's plan", "below", "vio", "vio, none", "no steps of the solver"),
        ),
        measure=_measure,
        limits=(0.0, 1e3),
        seconds=10,
        note=f"{_TOKENS} tokens, {_EXPERTS} experts of which some are preferred; the router with 20 steps of 0.01",
    )


def _measure(seed: int) -> Values:
    chance = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(_TOKENS, WIDTH, generator=chance)
    weight_ED = torch.randn(_EXPERTS, WIDTH, generator=chance) * 0.15
    logit_TE = x_TD @ weight_ED.t() + torch.linspace(0.5, -0.5, _EXPERTS)
    cost_ET = -logit_TE.softmax(1).double().t().numpy()
    share_E, ones_T = np.full(_EXPERTS, _TOKENS / _EXPERTS), np.ones(_TOKENS)
    program = transport(cost_ET.T, np.full(_EXPERTS, _TOKENS // _EXPERTS)).value + 0.5 * _TOKENS
    one, two, any_ = (transport_sparse(cost_ET, share_E, ones_T, k=k) for k in (1, _K, _EXPERTS))
    vio = {}
    for name, steps in (("vio", 20), ("vio, none", 0)):
        router = SparseTransport(WIDTH + 1, _EXPERTS, top_k=1, iterations=steps)
        with torch.no_grad():
            router.weight.copy_(torch.cat([weight_ED, torch.linspace(0.5, -0.5, _EXPERTS)[:, None]], 1))
            vio[name] = max_vio(router(torch.cat([x_TD, torch.ones(_TOKENS, 1)], 1)))
    entries = {name: float((plan.plan_MN > 1e-12).sum(0).mean()) for name, plan in (("two", two), ("any", any_))}
    return {
        "gap": abs(one.dual - program),
        "gap, 2": abs(two.dual - program),
        "over": max(0.0, entries["two"] - _K),
        "over, any": max(0.0, entries["any"] - _K),
        **vio,
    }
