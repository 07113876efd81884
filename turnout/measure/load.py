"""How evenly the experts are used: MaxVio, entropy, coefficient of variation, dead experts, dropped share."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from turnout.errors import ShapeError, word
from turnout.expects import expects, several
from turnout.types import Report, Routing, Trace
from turnout.types.report import Value

__all__ = ["coefficient_of_variation", "dead_experts", "dropped_share", "entropy", "load_report", "max_vio"]


@expects(load_E=Tensor)
def max_vio(load_E: Tensor) -> float:
    """How far the busiest expert is above the mean: max load / mean load - 1; 0 when even.

    Args:
        load_E: (E,) tokens (or shares) of each expert, not negative. A load of nothing counts as even.

    Returns:
        A number from 0 (even) to E - 1 (one expert takes everything).

    Raises:
        ShapeError: not a vector of at least one finite, non-negative number.

    >>> max_vio(torch.tensor([3, 1, 1, 3]))
    0.5

    Source: Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", MaxVio.
    """
    share_E = _shares(load_E, "max_vio")
    return float(share_E.max() * share_E.numel() - 1)


@expects(load_E=Tensor)
def entropy(load_E: Tensor) -> float:
    """The entropy of the load, divided by log E: 1 when even, 0 when one expert takes everything.

    H = -sum_e p_e log p_e / log E, with p_e the share of expert e; 1 for a single expert.

    Args:
        load_E: (E,) tokens (or shares) of each expert, not negative. A load of nothing counts as even.

    Returns:
        A number in [0, 1].

    Raises:
        ShapeError: not a vector of at least one finite, non-negative number.

    >>> entropy(torch.tensor([2, 2])), entropy(torch.tensor([4, 0]))
    (1.0, 0.0)

    Source: Shannon, 1948, "A Mathematical Theory of Communication"; normalised by its maximum.
    """
    share_E = _shares(load_E, "entropy")
    if share_E.numel() == 1:
        return 1.0
    return float(torch.special.entr(share_E).sum().clamp(min=0.0) / math.log(share_E.numel()))


@expects(load_E=Tensor)
def coefficient_of_variation(load_E: Tensor) -> float:
    """The standard deviation of the load over the experts (dividing by E), divided by its mean; 0 when even.

    Args:
        load_E: (E,) tokens (or shares) of each expert, not negative. A load of nothing counts as even.

    Returns:
        A number from 0 to sqrt(E - 1).

    Raises:
        ShapeError: not a vector of at least one finite, non-negative number.

    >>> coefficient_of_variation(torch.tensor([1, 3]))
    0.5

    Source: Shazeer et al., 2017, "Outrageously Large Neural Networks", whose load loss is its square.
    """
    share_E = _shares(load_E, "coefficient_of_variation")
    return float(share_E.std(correction=0) * share_E.numel())


@expects(load_E=Tensor)
def dead_experts(load_E: Tensor, *, below: float = 0.0) -> tuple[int, ...]:
    """The experts whose load is at most ``below`` times the even share; by default those that receive nothing.

    Args:
        load_E: (E,) tokens (or shares) of each expert, not negative.
        below: a fraction of the even share, for experts that are nearly dead.

    Raises:
        ShapeError: not a vector of at least one finite, non-negative number.

    >>> dead_experts(torch.tensor([5, 0, 90, 5])), dead_experts(torch.tensor([5, 0, 90, 5]), below=0.25)
    ((1,), (0, 1, 3))

    Source: none; a count.
    """
    load_E = _checked(load_E, "dead_experts")
    limit = below * float(load_E.mean())
    return tuple(torch.nonzero(load_E <= limit).flatten().tolist())


@expects(routing=several(Routing, also=(Routing,)))
def dropped_share(routing: Routing | Sequence[Routing]) -> float:
    """The share of wanted entries that capacity took away, over one routing or several together.

    Args:
        routing: one decision, or those of several layers or batches.

    Returns:
        A number in [0, 1]; 0 when nothing was truncated or wanted.

    >>> routing = Routing.from_topk(torch.tensor([[0], [0], [1]]), torch.ones(3, 1), num_experts=2)
    >>> round(dropped_share(routing.truncate(1)), 3)
    0.333

    Source: Fedus et al., 2021, "Switch Transformers", dropped tokens.
    """
    routings = [routing] if isinstance(routing, Routing) else list(routing)
    dropped = sum(int(one.dropped_E.sum()) for one in routings)
    wanted = dropped + sum(one.num_entries for one in routings)
    return dropped / wanted if wanted else 0.0


@expects(source=several(Routing, also=(Routing, Tensor, Trace)))
def load_report(source: Routing | Sequence[Routing] | Tensor | Trace, *, title: str = "expert load") -> Report:
    """The balance of each layer, and over the layers: the mean, and the worst MaxVio.

    Args:
        source: a Routing, one Routing per layer, a load (E,) or (L, E), or a recorded Trace.
        title: of the report.

    Returns:
        A Report with ``layers``, ``experts``, ``tokens`` (routed entries where only a load is known), ``max_vio``,
        ``max_vio_worst``, ``entropy``, ``coefficient_of_variation``, ``dead_experts`` (over all layers),
        ``dropped`` (None where it is not known) and the same ``..._by_layer``.

    Raises:
        ShapeError: there is no layer, or a load is not a vector of non-negative numbers.

    >>> print(load_report(torch.tensor([[1, 1], [3, 1]])))
    expert load
      layers                             2
      experts                            [2, 2]
      tokens                             None
      max_vio                            0.25
      max_vio_worst                      0.5
      entropy                            0.905639
      coefficient_of_variation           0.25
      dead_experts                       0
      dropped                            None
      max_vio_by_layer                   [0.0, 0.5]
      entropy_by_layer                   [1.0, 0.8112781244591328]
      coefficient_of_variation_by_layer  [0.0, 0.5]
      dead_experts_by_layer              [[], []]

    Source: none; the meters of this file side by side.
    """
    load_L, tokens, dropped = _loads(source)
    if not load_L:
        raise ShapeError(
            word(
                "the source",
                got="no layer",
                allowed="have at least one routed layer",
                where="load_report",
                fix="pass the routings of a mixture-of-experts model",
            )
        )
    return Report(title, _values(load_L, tokens, dropped))


def _values(load_L: list[Tensor], tokens: int | None, dropped: float | None) -> dict[str, Value]:
    violation_L = [max_vio(load_E) for load_E in load_L]
    entropy_L = [entropy(load_E) for load_E in load_L]
    variation_L = [coefficient_of_variation(load_E) for load_E in load_L]
    dead_L = [list(dead_experts(load_E)) for load_E in load_L]
    return {
        "layers": len(load_L),
        "experts": [load_E.numel() for load_E in load_L],
        "tokens": tokens,
        "max_vio": sum(violation_L) / len(load_L),
        "max_vio_worst": max(violation_L),
        "entropy": sum(entropy_L) / len(load_L),
        "coefficient_of_variation": sum(variation_L) / len(load_L),
        "dead_experts": sum(map(len, dead_L)),
        "dropped": dropped,
        "max_vio_by_layer": violation_L,
        "entropy_by_layer": entropy_L,
        "coefficient_of_variation_by_layer": variation_L,
        "dead_experts_by_layer": dead_L,
    }


def _loads(source: Routing | Sequence[Routing] | Tensor | Trace) -> tuple[list[Tensor], int | None, float | None]:
    """The load of each layer, how many tokens were routed, and the dropped share; the last two None if unknown."""
    if isinstance(source, Trace):
        return [source.load(layer) for layer in range(source.num_layers)], source.num_tokens, None
    if isinstance(source, Tensor):
        return list(source[None] if source.ndim < 2 else source), None, None
    routings = [source] if isinstance(source, Routing) else list(source)
    tokens = routings[0].num_real if routings else 0
    return [routing.load_E for routing in routings], tokens, dropped_share(routings)


def _shares(load_E: Tensor, where: str) -> Tensor:
    """(E,) float64 shares that sum to 1; even when nothing was routed."""
    load_E = _checked(load_E, where)
    total = load_E.sum()
    return load_E / total if total > 0 else torch.full_like(load_E, 1 / load_E.numel())


def _checked(load_E: Tensor, where: str) -> Tensor:
    load_E = load_E.detach().cpu().double()
    if load_E.ndim != 1 or load_E.numel() == 0 or not bool((torch.isfinite(load_E) & (load_E >= 0)).all()):
        raise ShapeError(
            word(
                "load_E",
                got=f"shape {tuple(load_E.shape)}"
                + (f", values {float(load_E.min())}..{float(load_E.max())}" if load_E.numel() else ""),
                allowed="be a vector of one finite, non-negative number per expert",
                where=f"turnout.measure.{where}",
                fix="pass routing.load_E, or one row of a (L, E) load",
            )
        )
    return load_E
