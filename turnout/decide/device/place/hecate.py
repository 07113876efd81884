"""FSSDP (Hecate): in each iteration a few busy experts get copies for as long as it lasts, and no expert moves."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from turnout.decide.device.place.slots import Slots, speeds
from turnout.errors import UsageError, word
from turnout.types import Placement

__all__ = ["Materialised", "hecate"]

_WHERE = "turnout.decide.device.place.hecate"


@dataclasses.dataclass(frozen=True)
class Materialised:
    """The copies of one iteration.

    Args:
        placement: the home of each expert, and its copies.
        bytes: that the sparse all-gather brings to the copies, sum of (copies - 1) x bytes of an expert; the sparse
            reduce-scatter takes the same home again, as gradients.

    >>> Materialised(Placement.contiguous([2], devices=2), 0.0).placement.slots
    2

    Source: none; plain bookkeeping.
    """

    placement: Placement
    bytes: float


def hecate(
    home: Placement,
    load_LE: Sequence[np.ndarray],
    *,
    spare: int,
    expert_bytes: float = 0.0,
    goal: float = 1.05,
    speed_G: np.ndarray | None = None,
) -> Materialised:
    """Copies for one iteration: the busiest device's busiest experts, on the least busy device with room.

    A copy is made where it makes the busiest device less busy without another becoming as busy; it ends when the
    busiest device is at the goal, or no copy helps.

    Args:
        home: one copy of each expert, where its shard of parameters and optimizer state stays.
        load_LE: for each layer the load that its experts are expected to have, such as the last iteration's.
        spare: copies that a device has room for in a layer, besides its own.
        expert_bytes: of one expert's parameters.
        goal: busiest device over mean that is good enough.
        speed_G: of each device, relative.

    Returns:
        The placement and its bytes.

    Raises:
        UsageError: room below 0, or loads of another model.

    >>> found = hecate(Placement.contiguous([4], devices=2), [np.array([6, 0, 1, 1])], spare=1, expert_bytes=10)
    >>> found.placement.on(0, 1), found.bytes
    ((0, 2, 3), 20.0)

    Source: Qing et al., 2025, "Hecate: Unlocking Efficient Sparse Model Training via Fully Sharded Sparse Data
    Parallelism"; copies by load alone, without its terms for the topology, and tokens dealt evenly to them.
    """
    if not isinstance(spare, int) or isinstance(spare, bool) or spare < 0:
        raise UsageError(word("spare", got=spare, allowed="be at least 0", where=_WHERE, fix="pass spare=1"))
    if tuple(map(len, load_LE)) != home.num_experts_L:
        got, fix = f"{tuple(map(len, load_LE))} experts", "pass the loads of the model that was placed"
        raise UsageError(word("load_LE", got=got, allowed=f"be of {home.num_experts_L}", where=_WHERE, fix=fix))
    speed_G = speeds(speed_G, home.devices, _WHERE)
    held_LGE = []
    for number, load_E in enumerate(load_LE):
        layer, room_G = Slots(load_E, home.held(number), speed_G), np.full(home.devices, spare)
        while layer.worst > goal and _copied(layer, room_G):
            pass
        held_LGE.append(layer.held_GE)
    placement = Placement.of(held_LGE, nodes=home.nodes, layers=home.layers)
    return Materialised(placement, float(expert_bytes) * (placement.slots - sum(home.num_experts_L)))


def _copied(layer: Slots, room_G: np.ndarray) -> bool:
    """Makes one more copy, if one helps."""
    busiest, worst = int(layer.time_G.argmax()), layer.time_G.max()
    mine = np.nonzero(layer.held_GE[busiest])[0]
    for expert in mine[np.argsort(-layer.share_E[mine], kind="stable")].tolist():
        more = layer.load_E[expert] / (layer.count_E[expert] + 1)
        after_G = np.where((room_G > 0) & ~layer.held_GE[:, expert], layer.time_G + more / layer.speed_G, np.inf)
        device = int(after_G.argmin())
        if more and after_G[device] < worst * (1 - 1e-9):
            layer.held_GE[device, expert] = True
            room_G[device] -= 1
            layer.refresh()
            return True
    return False
