"""Placement by load: copies for the busiest experts, the largest first onto the least busy device, then exchanges."""

import heapq
from collections.abc import Sequence

import numpy as np

from turnout.decide.device.place.slots import Slots, capacities, speeds, tables
from turnout.types import Placement

__all__ = ["by_load", "even_out"]

# Slots that may be better left empty, as an even deal to one copy more can be a worse fit; not tried once it is as even
# as this.
_EMPTY, _ENOUGH = 4, 1e-3
_WHERE = "turnout.decide.device.place.by_load"


def by_load(
    load_LE: Sequence[np.ndarray],
    *,
    devices: int,
    slots: int | None = None,
    nodes: int = 1,
    speed_G: np.ndarray | None = None,
) -> Placement:
    """The placement whose busiest device in each layer is busy as little as this finds.

    As EPLB, replicas go one by one to the expert with the most load a copy, and copies, the largest first, to the least
    busy device with room that has none of it. Then the busiest device exchanges a copy with another, or a spare copy
    elsewhere makes room for one of its experts, as long as that helps.

    Args:
        load_LE: for each layer the load of its experts.
        devices: G.
        slots: the most copies in a layer, room for them spread evenly over the devices; None for one of each expert.
        nodes: machines; they only name the devices here.
        speed_G: of each device, relative.

    Returns:
        The placement; no device has an expert twice.

    Raises:
        UsageError: slots that do not hold the experts.

    >>> placement = by_load([np.array([8, 4, 2, 2])], devices=2)
    >>> [placement.on(0, device) for device in range(2)]
    [(0, 3), (1, 2)]
    >>> by_load([np.array([8, 4, 2, 2])], devices=2, slots=5).count(0).tolist()
    [2, 1, 1, 1]

    Source: Graham, 1969, "Bounds on Multiprocessing Timing Anomalies", the largest first; replicas as EPLB, 2025; here
    with exchanges and without two copies on a device.
    """
    loads, slots = tables(list(load_LE), devices, slots, _WHERE)
    speed_G, room_G = speeds(speed_G, devices, _WHERE), capacities(slots, devices)
    held_LGE = []
    for load_E in loads:
        tried = []
        for empty in range(min(_EMPTY, slots - len(load_E)) + 1):
            tried.append(_layer(load_E, slots - empty, room_G, speed_G))
            if tried[-1][0] < 1 + _ENOUGH:
                break
        held_LGE.append(min(tried, key=lambda one: one[0])[1])
    return Placement.of(held_LGE, nodes=nodes)


def _layer(load_E: np.ndarray, copies: int, room_G: np.ndarray, speed_G: np.ndarray) -> tuple[float, np.ndarray]:
    """How busy the busiest device is, and what they hold; empty slots are experts that nobody calls."""
    empty = np.zeros(int(room_G.sum()) - copies)
    count_E = np.concatenate([_copies(load_E, copies, len(room_G)), np.ones(len(empty), dtype=np.int64)])
    whole_E = np.concatenate([load_E, empty])
    layer = Slots(whole_E, _packed(whole_E, count_E, room_G, speed_G), speed_G)
    even_out(layer)
    return layer.worst, layer.held_GE[:, : len(load_E)]


def even_out(layer: Slots) -> None:
    """Exchanges copies of the busiest device while it gets less busy. Each turn lowers it, so there is an end."""
    while True:
        device = int(layer.time_G.argmax())
        if not layer.even or layer.worst <= 1 + 1e-9:
            return
        swapped, expert, other, instead = layer.best_swap(device)
        if swapped < layer.worst * (1 - 1e-9):
            layer.swap(device, expert, other, instead)
            continue
        replaced, come, other, gone = layer.best_replacement(device)
        if replaced >= layer.worst * (1 - 1e-9):
            return
        layer.replace(other, gone, come)


def _copies(load_E: np.ndarray, slots: int, devices: int) -> np.ndarray:
    """(E,) copies, each more to the expert with the most load a copy that is not on every device yet."""
    count_E = np.ones(len(load_E), dtype=np.int64)
    heap = [(-float(load), expert) for expert, load in enumerate(load_E)] if devices > 1 else []
    heapq.heapify(heap)
    for _ in range(slots - len(load_E)):
        _, expert = heapq.heappop(heap)
        count_E[expert] += 1
        if count_E[expert] < devices:
            heapq.heappush(heap, (-float(load_E[expert] / count_E[expert]), expert))
    return count_E


def _packed(load_E: np.ndarray, count_E: np.ndarray, room_G: np.ndarray, speed_G: np.ndarray) -> np.ndarray:
    """(G, E) the copies on devices: the largest first, to where it is done soonest."""
    share_E, held_GE = load_E / count_E, np.zeros((len(room_G), len(load_E)), dtype=bool)
    busy_G, room_G = np.zeros(len(room_G)), room_G.copy()
    for expert in np.repeat(np.arange(len(load_E)), count_E)[np.argsort(-np.repeat(share_E, count_E), kind="stable")]:
        done_G = np.where((room_G > 0) & ~held_GE[:, expert], (busy_G + share_E[expert]) / speed_G, np.inf)
        device = int(done_G.argmin())
        if not np.isfinite(done_G[device]):  # only devices that have it have room: one with none of it sends one there
            device, full = int((room_G > 0).argmax()), int((~held_GE[:, expert]).argmax())
            sent = int((held_GE[full] & ~held_GE[device]).argmax())
            held_GE[full, sent], held_GE[device, sent], held_GE[full, expert] = False, True, True
            busy_G[full] += share_E[expert] - share_E[sent]
            busy_G[device] += share_E[sent]
        else:
            held_GE[device, expert] = True
            busy_G[device] += share_E[expert]
        room_G[device] -= 1
    return held_GE
