"""Self-contrast: a model's scores against those that it has when its tokens take an expert of a lower rank."""

import dataclasses
import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import ByScore
from turnout.errors import UsageError, word
from turnout.layers import MoE
from turnout.layers.turnout import decide
from turnout.models.lm import LM
from turnout.models.padding import Places
from turnout.types import Routing
from turnout.wrappers import unwrapped

__all__ = ["Contrast", "by_score", "ranked"]

_WHERE = "turnout.models.Contrast"


@dataclasses.dataclass(frozen=True)
class Contrast:
    """How the scores of a model are contrasted with its own when each token takes one expert of a lower rank.

    z = (1 + beta) z_strong - beta z_weak where z_strong >= ln(alpha) + max z_strong, and -inf elsewhere. The strong
    scores are the model's own; for the weak ones every token, of the prompt too, goes in every routed layer to its
    expert of this rank alone (and to the shared one).

    Args:
        beta: how much, at least 0. At 0 the model's own scores come out to the bit, and nothing is left out.
        alpha: tokens are left out that are less likely than this share, above 0 and at most 1, of the likeliest.
        rank: which expert of a token, 1 for the one with the highest score, 2 for the next.

    Raises:
        UsageError: a value out of its range.

    >>> Contrast(beta=1.0, alpha=0.5).scores(torch.tensor([[2.0, 1.8, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]]))
    tensor([[2.0000, 2.6000,   -inf]])

    Source: Shi et al., 2024, "Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast"; its
    defaults. There k = 2 is the second expert; the authors' code counts from 0, and its example passes 2. At beta=0
    the paper would still leave out what is less likely than alpha, which greedy decoding does not see.
    """

    beta: float = 0.5
    alpha: float = 0.1
    rank: int = 2

    def __post_init__(self) -> None:
        for name, fits, allowed, fix in (
            ("beta", 0 <= self.beta < math.inf, "be a finite number of at least 0", "pass beta=0.5"),
            ("alpha", 0 < self.alpha <= 1, "be above 0 and at most 1", "pass alpha=0.1"),
            ("rank", type(self.rank) is int and self.rank >= 1, "be a whole number of at least 1", "pass rank=2"),
        ):
            if not fits:
                raise UsageError(word(name, got=getattr(self, name), allowed=allowed, where=_WHERE, fix=fix))

    def scores(self, strong_BV: Tensor, weak_BV: Tensor) -> Tensor:
        """(B, V) what is drawn from in the place of the strong scores."""
        if self.beta == 0:
            return strong_BV
        strong_BV, weak_BV = strong_BV.float(), weak_BV.float()
        least_B1 = strong_BV.amax(1, keepdim=True) + math.log(self.alpha)
        z_BV = (1 + self.beta) * strong_BV - self.beta * weak_BV
        return z_BV.masked_fill(strong_BV < least_B1, -math.inf)

    def check(self, lm: LM) -> None:
        """Refuses models whose tokens have no expert of this rank.

        Raises:
            UsageError: a dense model, a router that does not choose by each token's own scores, or one with fewer.
        """
        for router in by_score(lm, _WHERE):
            most = router.num_experts
            if (groups := getattr(router, "num_groups", 1)) > 1:  # a rank is one among the groups that are open
                most = most // groups * getattr(router, "top_groups", groups)
            if self.rank > most:
                allowed, fix = f"be at most {most}, as many experts as a token has scores of", f"pass rank={most}"
                raise UsageError(word("rank", got=self.rank, allowed=allowed, where=_WHERE, fix=fix))


def by_score(lm: LM, where: str) -> list[ByScore]:
    """The routers of a model, each of which chooses for each token by that token's own scores alone.

    Raises:
        UsageError: the model has none, or others; the message names them.
    """
    if not lm.routers or lm.rope.border is not None:
        got = (
            "one without routed layers" if not lm.routers else "one whose frequencies change with the length (longrope)"
        )
        allowed, fix = "have routers, and the same frequencies at every length", "generate with it as it is"
        raise UsageError(word("the model", got=got, allowed=allowed, where=where, fix=fix))
    routers: list[Any] = [unwrapped(router) for router in lm.routers]
    for router in routers:
        limited = getattr(router, "capacity_factor", None) is not None
        if limited or not isinstance(router, ByScore):
            got = f"{type(router).__name__}{', which limits what an expert takes' if limited else ''}"
            allowed = "choose for each token by its own scores, as TopK, LossFree, GroupLimited, Switch and GShard do"
            raise UsageError(word("the router", got=got, allowed=allowed, where=where, fix="leave it out here"))
    return routers


def ranked(rank_B: Tensor) -> Any:
    """What decides where some rows of a batch take one expert alone: a ``detour`` of ``LM.hidden``.

    Args:
        rank_B: (B,) the rank of that expert; 0 for rows that are routed as ever.
    """

    def detour(layer: int, moe: MoE, x_BSD: Tensor, places: Places | None) -> Routing:
        rank_BS = rank_B.to(x_BSD.device)[:, None].expand(x_BSD.shape[:2])
        inside: Any = unwrapped(cast(nn.Module, moe.router))
        return decide(_Ranked(inside), x_BSD, rank_BS, None, None if places is None else places.real_BS)

    return detour


class _Ranked(nn.Module):
    """A policy that is told each token's rank in the place of its id."""

    def __init__(self, router: ByScore) -> None:
        super().__init__()
        self._of = (router,)  # in a tuple, or it would pass for a wrapper of the router

    def forward(self, x_TD: Tensor, *, token_id_T: Tensor, generator: torch.Generator | None = None) -> Routing:
        (router,) = self._of
        E = router.num_experts
        logit_TE, score_TE = router.scored(x_TD)
        index_TK, weight_TK = router.chosen(score_TE)
        for rank in token_id_T.unique().tolist():
            if rank > 0:
                of_T = token_id_T == rank
                one_T1, weight_T1 = router.chosen(score_TE[of_T], rank=rank)
                # The other places of such a token are of no expert.
                index_TK[of_T] = _filled(one_T1, index_TK.shape[1], E)
                weight_TK[of_T] = _filled(weight_T1, index_TK.shape[1], 0)
        more: dict[str, Any] = {"score_TE": score_TE, "logit_TE": logit_TE}
        return Routing.from_topk(index_TK, weight_TK, num_experts=E, dropped=E, **more)


def _filled(one_T1: Tensor, width: int, value: float) -> Tensor:
    """(T, K) with one column, and this in the others."""
    return nn.functional.pad(one_T1, (0, width - 1), value=value)
