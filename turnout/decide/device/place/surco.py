"""SurCo on placements: experts on devices by a latency that no linear cost says, such as one that was measured."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from turnout.decide.device.place.slots import capacities
from turnout.errors import UsageError, word
from turnout.solve import assignment, surrogate
from turnout.types import Placement, Traffic

__all__ = ["latency", "surco"]

_WHERE = "turnout.decide.device.place.surco"


def surco(
    cost: Callable[[Tensor], Tensor],
    start: Placement,
    *,
    guide: Callable[[Tensor], Tensor] | None = None,
    steps: int = 60,
    reach: float = 1.0,
    rate: float = 0.1,
    trust: float = 0.02,
) -> Placement:
    """One copy of each expert, as many on each device, at the least of a cost that is any function of the placement.

    Linear costs c_leg of having expert e of layer l on device g are learned; for given ones the best placement is an
    exact assignment a layer. Their start says ``start``.

    Args:
        cost: (L, G, E) tables of 0 and 1 -> a number; differentiable almost everywhere. ``latency`` makes one.
        start: where to begin; each expert once, layers alike.
        guide: what gradients are of; None for the cost itself. ``latency(..., norm=4)`` is a smoother one.
        steps: of the descent.
        reach: how far a gradient moves the linear costs.
        rate: of Adam.
        trust: how far the first linear costs lie from even, towards ``start``: between 0 and 0.5.

    Returns:
        The best placement seen; no worse than ``start``.

    Raises:
        UsageError: a start with copies, or with layers of different sizes.

    >>> told = Traffic((np.array([3, 3, 1, 1]),), ())
    >>> found = surco(latency(told), Placement.contiguous([4], devices=2), guide=latency(told, norm=4))
    >>> told.imbalance(found) <= told.imbalance(Placement.contiguous([4], devices=2))
    True

    Source: Ferber et al., 2023, "SurCo", SurCo-zero, on what its authors do with embedding tables.
    """
    experts, devices = start.num_experts_L[0], start.devices
    full = [tuple(start.held(layer).sum(1)) for layer in range(start.num_layers)]
    if start.slots != sum(start.num_experts_L) or len(set(start.num_experts_L)) > 1 or len(set(full)) > 1:
        got, fix = f"{start.slots} slots for {start.num_experts_L} experts", "pass Placement.contiguous(...)"
        allowed = "hold each expert once, and all layers alike"
        raise UsageError(word("start", got=got, allowed=allowed, where=_WHERE, fix=fix))
    seat_P = np.repeat(np.arange(devices), full[0] if full else capacities(experts, devices))

    def oracle(cost_LGE: np.ndarray) -> np.ndarray:
        x_LGE = np.zeros_like(cost_LGE)
        for x_GE, cost_GE in zip(x_LGE, cost_LGE, strict=True):
            x_GE[seat_P[assignment(cost_GE.T[:, seat_P]).column_M], np.arange(experts)] = 1
        return x_LGE

    held_LGE = np.stack([start.held(layer) for layer in range(start.num_layers)]).astype(float)
    found = surrogate(cost, oracle, 0.5 + trust * (0.5 - held_LGE), guide=guide, steps=steps, reach=reach, rate=rate)
    return Placement.of(list(found.x_N > 0.5), nodes=start.nodes, layers=start.layers)


def latency(
    traffic: Traffic,
    *,
    measured: Sequence[tuple[float, float]] = ((0.0, 0.0), (1.0, 1.0)),
    wire: float = 0.0,
    norm: float = math.inf,
) -> Callable[[Tensor], Tensor]:
    """How long a placement's layers take: in each, the busiest device, and the device with most tokens to send.

    sum_l max_g t(entries of g) + wire x max_g (weight that leaves g for the next layer). t goes through the measured
    points in straight lines and on beyond the last: a device's time is often flat up to some number of tokens, then
    rises.

    Args:
        traffic: of a trace.
        measured: (entries, seconds) of a layer's experts on a device, rising, at least two.
        wire: seconds that an entry takes to another device.
        norm: the power whose norm over the devices is taken, in place of the maximum.

    Returns:
        A function of (L, G, E) tables of 0 and 1.

    Raises:
        UsageError: fewer than two points, or points that do not rise.

    >>> told = Traffic((np.array([3, 1]),), ())
    >>> float(latency(told, measured=((0, 1.0), (2, 1.0), (4, 2.0)))(torch.eye(2, dtype=torch.float64)[None]))
    1.5

    Source: none; maxima over devices are what makes linear costs wrong.
    """
    at, takes = (torch.tensor([point[side] for point in measured], dtype=torch.float64) for side in (0, 1))
    if len(at) < 2 or (at.diff() <= 0).any() or (takes.diff() < 0).any():
        fix = "pass ((0, 0.1), (1000, 0.1), (2000, 0.2))"
        got, allowed = f"{list(measured)}", "be at least two points that rise"
        raise UsageError(word("measured", got=got, allowed=allowed, where=_WHERE, fix=fix))
    slope = takes.diff() / at.diff()
    loads = [torch.tensor(load_E, dtype=torch.float64) for load_E in traffic.load_LE]
    steps = [torch.tensor(step_EE, dtype=torch.float64) for step_EE in traffic.step_LEE]

    def takes_(x_LGE: Tensor) -> Tensor:
        total = x_LGE.new_zeros(())
        for layer, load_E in enumerate(loads):
            load_G = x_LGE[layer] @ load_E
            piece_G = (torch.searchsorted(at, load_G.detach().contiguous(), right=True) - 1).clamp(0, len(slope) - 1)
            total = total + (takes[piece_G] + slope[piece_G] * (load_G - at[piece_G])).norm(norm)
            if wire and layer < len(steps):
                stays_G = ((x_LGE[layer] @ steps[layer]) * x_LGE[layer + 1]).sum(1)
                total = total + wire * (x_LGE[layer] @ steps[layer].sum(1) - stays_G).norm(norm)
        return total

    return takes_
