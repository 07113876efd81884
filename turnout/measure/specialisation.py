"""What experts know of the text, what one layer's choice says of the next one's, and how much routing still moves."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from turnout.errors import ShapeError, word
from turnout.expects import expects, several
from turnout.types import Routing

__all__ = ["layer_affinity", "routing_kept", "specialisation"]

_ROOM = "turnout.measure"


@expects(load_by_domain=Mapping)
def specialisation(load_by_domain: Mapping[str, Sequence[Sequence[float]]]) -> float:
    """How much of what domain a token is from its expert tells, from 0 (nothing) to 1 (all); the mean of the layers.

    I(domain; expert) / H(domain), domains being equally frequent.

    Args:
        load_by_domain: domain -> (L, E) the shares of the domain's tokens that went to each expert.

    Raises:
        ShapeError: fewer than two domains, or of different layers.

    >>> specialisation({"code": [[1.0, 0.0]], "prose": [[0.0, 1.0]]})
    1.0

    Source: Jiang et al., 2024, "Mixtral of Experts", section 5, which looks at shares by domain; as mutual information.
    """
    tables = [[list(map(float, row)) for row in one] for one in load_by_domain.values()]
    if len(tables) < 2 or len({len(one) for one in tables}) != 1 or not tables[0]:
        got, fix = f"{len(tables)} domains", "pass what evaluating on two domains gives"
        allowed, where = "be two or more, with the same layers", f"{_ROOM}.specialisation"
        raise ShapeError(word("load_by_domain", got=got, allowed=allowed, where=where, fix=fix))
    found = []
    for rows in zip(*tables, strict=True):
        joint_ME = torch.tensor(rows, dtype=torch.float64).clamp_min(0)
        joint_ME = joint_ME / joint_ME.sum(1, keepdim=True).clamp_min(1e-12) / len(rows)
        found.append(_mutual(joint_ME) / torch.tensor(float(len(rows)), dtype=torch.float64).log())
    return float(torch.stack(found).mean())


@expects(routings=several(Routing))
def layer_affinity(routings: Sequence[Routing]) -> float:
    """How much of a token's expert the layer before tells, from 0 to 1; the mean over neighbouring layers.

    I / min(H, H') of the counts of ``Routing.affinity``, less what as many tokens would show by chance alone.

    Args:
        routings: of the same tokens by neighbouring layers, two or more.

    Raises:
        ShapeError: fewer than two, or of different tokens.

    >>> one = Routing.from_topk(torch.arange(64)[:, None] % 4, torch.ones(64, 1), num_experts=4)
    >>> layer_affinity([one, one]) > 0.9
    True

    Source: Yao et al., 2024, "Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model
    Inference" (ExFlow), its conditional shares as one number.
    """
    if len(routings) < 2:
        where = f"{_ROOM}.layer_affinity"
        raise ShapeError(
            word("routings", got=len(routings), allowed="be two or more", where=where, fix="route two layers")
        )
    found = []
    for before, after in itertools.pairwise(routings):
        count_EE = before.affinity(after).double()
        joint_EE = count_EE / count_EE.sum().clamp_min(1)
        most = min(float(_entropy(joint_EE.sum(axis))) for axis in (0, 1))
        rows, columns = (int((joint_EE.sum(axis) > 0).sum()) for axis in (1, 0))
        chance = (rows - 1) * (columns - 1) / (2 * max(before.num_tokens, 1))  # of a table of independent choices
        found.append(0.0 if most <= 0 else max(0.0, float(_mutual(joint_EE)) - chance) / most)
    return sum(found) / len(found)


@expects(before=several(Routing))
def routing_kept(before: Sequence[Routing], after: Sequence[Routing]) -> float:
    """How much of a token's experts two states of a model share, from 0 to 1: |A and B| / |A or B|, all layers' mean.

    Args:
        before: of each layer, at one time.
        after: of the same tokens, at another.

    Raises:
        ShapeError: of different layers or tokens.

    >>> one = Routing.from_topk(torch.tensor([[0, 1], [2, 3]]), torch.ones(2, 2), num_experts=4)
    >>> two = Routing.from_topk(torch.tensor([[0, 2], [2, 3]]), torch.ones(2, 2), num_experts=4)
    >>> round(routing_kept([one], [two]), 3)
    0.667

    Source: Dai et al., 2022, "StableMoE: Stable Routing Strategy for Mixture of Experts", section 2, whose routing
    fluctuation is 1 less this for one expert a token.
    """
    sizes = [[(one.num_tokens, one.num_experts) for one in each] for each in (before, after)]
    if sizes[0] != sizes[1] or not sizes[0]:
        got, fix = f"{sizes[0]} and {sizes[1]}", "route the same text with both"
        where, allowed = f"{_ROOM}.routing_kept", "be of the same layers and tokens"
        raise ShapeError(word("before and after", got=got, allowed=allowed, where=where, fix=fix))
    found = []
    for one, two in zip(before, after, strict=True):
        here_TE, there_TE = one.detach().dense() != 0, two.detach().dense() != 0
        either_T = (here_TE | there_TE).sum(1).double()
        share_T = (here_TE & there_TE).sum(1) / either_T.clamp_min(1)
        found.append(float(torch.where(either_T > 0, share_T, torch.ones_like(share_T)).mean()))
    return sum(found) / len(found)


def _entropy(share: Tensor) -> Tensor:
    return -torch.special.xlogy(share, share).sum()


def _mutual(joint: Tensor) -> Tensor:
    return (_entropy(joint.sum(0)) + _entropy(joint.sum(1)) - _entropy(joint)).clamp_min(0)
