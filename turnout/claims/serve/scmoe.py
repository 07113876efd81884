"""Claim: what a model says through experts that it did not choose tells what it should say less of."""

import torch
from torch import Tensor
from torch.nn import functional as F

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.taught import EXPERTS, STEPS, TOP_K, taught
from turnout.claims.trial import SEQ, text
from turnout.models import LM, Contrast
from turnout.models.contrast import ranked
from turnout.train.data import windows

_SCORED, _ALL = 16_384, 1e-9
# The least and the middle of the strengths that the paper tries; its rank.
_SLIGHT, _USUAL, _RANK = 0.1, 0.5, 2


def scmoe() -> Claim:
    """Greedy tokens contrasted with a model's own second experts: against those of other places, and against none.

    The second is what the paper gains by, in reasoning, and small models of text do not.

    >>> scmoe().off
    'the weak scores of another place of the text'

    Source: Shi et al., 2024, "Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast".
    """
    wrong = "share of greedy tokens wrong"
    return Claim(
        name="scmoe",
        statement="Scores contrasted with those of each token's second expert err less than contrasted with those of "
        "another place, and than without.",
        source="Shi et al., 2024, SCMoE",
        off="the weak scores of another place of the text",
        switched={"contrast": "elsewhere"},
        rows=(
            Row(wrong, "below", "contrast", "elsewhere", "the weak scores of another place"),
            Row(wrong, "below", "contrast", "greedy", "the model's own scores", headline=True),
        ),
        measure=_measure,
        seconds=30,
        note=f"2 layers, width 64, {EXPERTS} experts, top {TOP_K}, {STEPS} steps of 1,024 tokens; beta {_USUAL:g}, "
        f"alpha 0.1; with beta {_SLIGHT:g} "
        "{slight:.4f} is wrong, and text has {nats slight:.3f} nats a token instead "
        "of {nats:.3f}, with the weak scores of another place {nats elsewhere:.3f}: scores are sharper, no more. "
        "Through second experts alone {nats weak:.3f}. The paper measures reasoning of 47 billion parameters",
        limits=(0.0, 20.0),
    )


def _measure(seed: int) -> Values:
    lm = taught(seed, routed=True)
    batches = list(windows(text().held_out, batch=8, seq=SEQ, limit=_SCORED))
    target_T = torch.cat([batch.target_BS.flatten() for batch in batches])
    there_T = target_T >= 0
    strong_TV, weak_TV = (_scores(lm, batches, rank)[there_T] for rank in (0, _RANK))
    target_T = target_T[there_T]
    other_T = torch.randperm(len(target_T), generator=torch.Generator().manual_seed(seed))
    elsewhere_TV, slight = weak_TV[other_T], Contrast(_SLIGHT, _ALL, _RANK)
    usual = Contrast(_USUAL, 0.1, _RANK)
    nats = {
        "nats": strong_TV,
        "nats weak": weak_TV,
        "nats slight": slight.scores(strong_TV, weak_TV),
        "nats elsewhere": slight.scores(strong_TV, elsewhere_TV),
    }
    wrong = {
        "greedy": strong_TV,
        "slight": slight.scores(strong_TV, weak_TV),
        "contrast": usual.scores(strong_TV, weak_TV),
        "elsewhere": usual.scores(strong_TV, elsewhere_TV),
    }
    found = {name: float(F.cross_entropy(score_TV, target_T)) for name, score_TV in nats.items()}
    return found | {name: _wrong(score_TV, target_T) for name, score_TV in wrong.items()}


@torch.no_grad()
def _scores(lm: LM, batches: list, rank: int) -> Tensor:
    """(T, V) the scores of all places, of the model or through the experts of this rank."""
    found = []
    for batch in batches:
        detour = ranked(torch.full((len(batch.id_BS),), rank)) if rank else None
        found.append(lm.scores(lm.hidden(batch.id_BS, detour=detour)[0]).flatten(0, 1))
    return torch.cat(found)


def _wrong(score_TV: Tensor, target_T: Tensor) -> float:
    return float((score_TV.argmax(1) != target_T).float().mean())
