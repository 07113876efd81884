"""What a placement is worth on a trace, beside what no placement can be worth more than."""

import heapq

import numpy as np

from turnout.expects import expects
from turnout.solve import kept_bound
from turnout.types import Placement, Report, Traffic

__all__ = ["placement_report"]


@expects(traffic=Traffic, placement=Placement)
def placement_report(
    traffic: Traffic,
    placement: Placement,
    *,
    before: Placement | None = None,
    expert_bytes: float = 0.0,
    speed_G: np.ndarray | None = None,
    slots: int | None = None,
) -> Report:
    """How even a placement is and how many steps cross, beside the contiguous one, chance, and bounds on all.

    ``imbalance``: how long the layers' busiest devices take, over how long it would be if all were busy alike.
    ``crossing``: the share of steps from layer to layer that change the device. Both are of tokens dealt evenly to the
    copies of an expert. No placement with these slots is below the bounds; ``crossing_chance`` is what an even one at
    random gives, so that what lies between the two belongs to the trace.

    Args:
        traffic: of the trace.
        placement: of the trace's model.
        before: what was there before; its moves are counted.
        expert_bytes: what travels with each copy.
        speed_G: of each device, relative.
        slots: copies that a layer has room for; None for those that it has.

    Returns:
        ``moves`` and ``bytes`` are None without ``before``.

    Raises:
        ShapeError: a placement of another model.

    >>> step_EE = np.array([[0.0, 4.0], [4.0, 0.0]])
    >>> told = Traffic((np.array([4, 4]), np.array([4, 4])), (step_EE,))
    >>> report = placement_report(told, Placement.contiguous([2, 2], devices=2))
    >>> report["crossing"], report["crossing_chance"], report["crossing_bound"], report["imbalance_bound"]
    (1.0, 0.5, 0.0, 1.0)

    Source: Yao et al., 2024, "Exploiting Inter-Layer Expert Affinity", for the share; the bounds are our own.
    """
    plain = Placement.contiguous(placement.num_experts_L, devices=placement.devices, nodes=placement.nodes)
    room_L = [max(len(copies), slots or 0) for copies in placement.phy2log]
    moves = before.moved(placement, expert_bytes=expert_bytes) if before is not None else None
    values = {
        **{name: getattr(placement, name) for name in ("devices", "nodes", "slots")},
        "experts": sum(placement.num_experts_L),
        "imbalance": traffic.imbalance(placement, speed_G),
        "imbalance_contiguous": traffic.imbalance(plain, speed_G),
        "imbalance_bound": _imbalance_bound(traffic, placement, room_L, speed_G),
        "crossing": traffic.crossing(placement),
        "crossing_contiguous": traffic.crossing(plain),
        "crossing_chance": 1 - 1 / placement.devices,
        "crossing_bound": _crossing_bound(traffic, placement, room_L),
        "crossing_nodes": traffic.crossing(placement, "node"),
        "crossing_nodes_contiguous": traffic.crossing(plain, "node"),
        "moves": len(moves.copies) if moves else None,
        "moved_share": moves.share if moves else None,
        "moved_bytes": moves.bytes if moves else None,
    }
    return Report("placement", values, context={"placement": placement.digest, "trace": traffic.source})


def _crossing_bound(traffic: Traffic, placement: Placement, room_L: list[int]) -> float:
    """No placement with room for as many copies has a lower share."""
    if not traffic.steps:
        return 0.0
    held_L = [int(placement.held(layer).sum(1).max()) for layer in range(placement.num_layers)]
    most_L = [max(held, -(-room // placement.devices)) for held, room in zip(held_L, room_L, strict=True)]
    single = sum(room_L) == sum(placement.num_experts_L)
    kept = sum(
        kept_bound(step_EE, placement.devices, most_L[layer], most_L[layer + 1], single=single)
        for layer, step_EE in enumerate(traffic.step_LEE)
    )
    return max(0.0, 1 - kept / traffic.steps)


def _imbalance_bound(traffic: Traffic, placement: Placement, room_L: list[int], speed_G: np.ndarray | None) -> float:
    """No placement with room for as many copies is less uneven: someone has the largest copy, and at least the mean."""
    speed_G = np.ones(placement.devices) if speed_G is None else speed_G
    least = total = 0.0
    for layer, load_E in enumerate(traffic.load_LE):
        even = float(load_E.sum() / speed_G.sum())
        copies, each = room_L[layer], int(placement.held(layer).sum(1).min())
        largest = _largest_copy(load_E, copies, placement.devices)
        if copies == len(load_E):  # the busiest expert has company: at best of the idlest ones
            largest += float(np.sort(load_E)[: max(each - 1, 0)].sum())
        least += max(even, largest / float(speed_G.max()))
        total += even
    return least / total if total else 1.0


def _largest_copy(load_E: np.ndarray, copies: int, devices: int) -> float:
    """The least that the largest copy can be: one more copy always to the largest, which is optimal."""
    heap = [(-float(load), float(load), 1) for load in load_E]
    heapq.heapify(heap)
    for _ in range(copies - len(load_E)):
        _, load, count = heap[0]
        if count == devices:
            break
        heapq.heapreplace(heap, (-load / (count + 1), load, count + 1))
    return -heap[0][0]
