"""Claim: neurons that a kind of text uses make better experts than random ones, and one router does for all layers."""

import numpy as np
import torch
from torch import Tensor

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.taught import HIDDEN, STEPS, score, taught
from turnout.claims.trial import SEQ, text
from turnout.reshape.to_sparse.read_me import read_me as reshape

_ROWS = 32
_ROUNDS = {"rounds": 2, "router_steps": 25, "backbone_steps": 25, "lr": 1e-3}
_ARMS: dict[str, dict[str, object]] = {
    "gate": {},
    "untrained": {"router_steps": 0},
    "random": {"by": "random"},
    "layers": {"router": "layers"},
}


def read_me() -> Claim:
    """A learned router and experts of active neurons lose less than without; one router no more than one a layer.

    Four arms with the same text, steps and learning rates: active neurons and one pre-gating router; the same router
    as it is initialised; random neurons; a linear router in each layer, which learns from the same labels.

    >>> read_me().off
    'a router that is not trained'

    Source: Cai et al., 2024, "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System
    Co-Design".
    """
    bits, why = "held-out bits per byte", "half of what random neurons cost"
    each = "a router in each layer"
    return Claim(
        name="read_me",
        statement="Experts of the neurons that a domain uses lose less with a trained router than with one that is "
        "not, and than random ones; one router for all layers does as well as one in each.",
        source="Cai et al., 2024, Read-ME",
        off="a router that is not trained",
        switched={"gate": "untrained"},
        rows=(
            Row(bits, "below", "gate", "untrained", "the same, its router as initialised"),
            Row(bits, "below", "gate", "random", "masks on random neurons"),
            Row(bits, "no_worse", "gate", "layers", each, margin=0.01, why=why, headline=True),
        ),
        measure=_measure,
        seconds=32,
        note=f"2 layers, width 64, hidden {HIDDEN}, 3 domains, half of the neurons for a token; {STEPS} dense steps, "
        f"then 2 rounds of {_ROUNDS['router_steps']} router and {_ROUNDS['backbone_steps']} model steps, of 1,024 "
        "tokens each; dense before {dense:.3f}",
    )


def _measure(seed: int) -> Values:
    lm, kinds = taught(seed, routed=False), domains(seed)
    found = {"dense": score(lm)}
    for name, options in _ARMS.items():
        new, _ = reshape(lm, kinds, seed=seed, **(_ROUNDS | options))  # type: ignore[arg-type]
        found[name] = score(new)
    return found


def domains(seed: int) -> dict[str, list[Tensor]]:
    """Training text of each domain alone: batches of 8 x 128 tokens."""
    tokens, found = text(), {}
    side, generator = tokens.train, torch.Generator().manual_seed(seed)
    for domain, name in enumerate(tokens.domains):
        whose_T = np.repeat(side.domain_N, np.diff(side.document_N))
        token_T = torch.from_numpy(side.token_T[whose_T == domain].astype("int64"))
        start_B = torch.randint(len(token_T) - SEQ, (_ROWS,), generator=generator)
        found[name] = list(torch.stack([token_T[start : start + SEQ] for start in start_B.tolist()]).split(8))
    return found
