"""Claim: expert choice balances the load exactly, by construction; and it leaks the future."""

import time

import torch

from turnout.claims.claim import Claim, Evidence
from turnout.claims.trial import SEEDS, Note
from turnout.decide.token import ExpertChoice, TopK
from turnout.types import Routing

_WIDTH, _EXPERTS, _TOP_K, _TOKENS = 32, 8, 2, 512


def expert_choice(*, note: Note = None) -> Claim:
    """Under expert choice every expert has exactly the same load; under token choice it has not.

    The caveat is measured beside it: changing the last token changes which experts earlier tokens get, which
    token choice never does, so expert choice is not for causal generation as it stands.

    >>> expert_choice().holds
    True

    Source: Zhou et al., 2022, "Mixture-of-Experts with Expert Choice Routing", section 3.2 and its limitations.
    """
    began = time.perf_counter()
    load, load_control, leak_control, leak = [], [], [], []
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        x_TD = torch.randn(_TOKENS, _WIDTH, generator=generator)
        ours = ExpertChoice(_WIDTH, _EXPERTS, capacity_factor=float(_TOP_K))
        token_choice = TopK(_WIDTH, _EXPERTS, top_k=_TOP_K)
        load.append(_max_vio(ours(x_TD)))
        load_control.append(_max_vio(token_choice(x_TD)))
        leak.append(_leaked(ours, x_TD, generator))
        leak_control.append(_leaked(token_choice, x_TD, generator))
        if note:
            note(f"seed {seed}: MaxVio {load[-1]:.3f} against {load_control[-1]:.3f}; leaked {leak[-1]:.4f}")
    return Claim(
        name="expert_choice",
        statement="Expert choice has an exactly even load by construction; unlike token choice it leaks the future.",
        source="Zhou et al., 2022, Expert Choice Routing",
        evidence=(
            Evidence("MaxVio", "within", tuple(load), tuple(load_control), "top-2 token choice", bound=0.0),
            Evidence(
                "earlier tokens rerouted by a later one (share; token choice against expert choice)",
                "within",
                tuple(leak_control),
                tuple(leak),
                "expert choice",
                bound=0.0,
            ),
        ),
        seconds=time.perf_counter() - began,
        note=f"{_TOKENS} random tokens, {_EXPERTS} experts, capacity factor {_TOP_K}, routers as initialised",
    )


def _max_vio(routing: Routing) -> float:
    load_E = routing.load_E.double()
    return float(load_E.max() / load_E.mean() - 1)


def _leaked(router: torch.nn.Module, x_TD: torch.Tensor, generator: torch.Generator) -> float:
    """The largest share of earlier tokens whose experts change when only the last token does, over 64 tries."""
    before_TE = router(x_TD).dense()[:-1] != 0
    worst = 0.0
    for _ in range(64):
        changed_TD = x_TD.clone()
        changed_TD[-1] = 4 * torch.randn(x_TD.shape[1], generator=generator)
        after_TE = router(changed_TD).dense()[:-1] != 0
        worst = max(worst, float((before_TE != after_TE).any(1).float().mean()))
    return worst
