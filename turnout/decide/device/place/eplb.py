"""EPLB: replicate the busiest experts, then pack copies onto devices, the largest first. The baseline."""

import dataclasses

import numpy as np

from turnout.decide.device.place.slots import tables
from turnout.errors import UsageError, word
from turnout.types import Placement

__all__ = ["Eplb", "eplb"]

_WHERE = "turnout.decide.device.place.eplb"


@dataclasses.dataclass(frozen=True, eq=False)
class Eplb:
    """What EPLB gives: equally many slots on each device, device after device.

    Args:
        phy2log: (L, slots) the expert of each slot.
        log2phy: (L, E, most copies) the slots of each expert, -1 where it has fewer.
        count: (L, E) copies of each expert.
        devices: G.
        nodes: machines.

    >>> found = eplb(np.array([[4.0, 2.0, 1.0]]), slots=4, devices=2)
    >>> found.count.tolist(), found.load(np.array([[4.0, 2.0, 1.0]])).tolist()
    ([[2, 1, 1]], [[4.0, 3.0]])

    Source: the tables of DeepSeek-AI, 2025, "Expert Parallelism Load Balancer".
    """

    phy2log: np.ndarray
    log2phy: np.ndarray
    count: np.ndarray
    devices: int
    nodes: int

    def load(self, load_LE: np.ndarray) -> np.ndarray:
        """(L, G) what each device gets when an expert's load is dealt evenly to its copies."""
        share_LE = np.asarray(load_LE, dtype=float) / self.count
        share_LP = np.take_along_axis(share_LE, self.phy2log, 1)
        return share_LP.reshape(len(share_LP), self.devices, -1).sum(2)

    def placement(self) -> Placement:
        """As a placement. Where EPLB put two copies of an expert on one device, one slot of the two is left empty."""
        held_LGE = np.zeros((len(self.count), self.devices, self.count.shape[1]), dtype=bool)
        layer, slot = np.indices(self.phy2log.shape)
        held_LGE[layer, slot // (self.phy2log.shape[1] // self.devices), self.phy2log] = True
        return Placement.of(list(held_LGE), nodes=self.nodes)


def eplb(load_LE: np.ndarray, *, slots: int, devices: int, groups: int = 1, nodes: int = 1) -> Eplb:
    """Copies and devices for the experts of each layer, by load alone.

    With groups a multiple of nodes: whole groups of experts are packed onto nodes, then each node's experts are
    replicated and packed onto its devices; else, all at once. Replicas go one by one to the expert with the most load
    a copy; packing goes from the largest copy to the least filled device with room.

    Args:
        load_LE: (L, E).
        slots: copies in a layer; a multiple of devices.
        devices: G, a multiple of nodes.
        groups: of experts that should share a node; divides E.
        nodes: machines.

    Returns:
        The tables. Two copies of an expert may lie on one device.

    Raises:
        UsageError: sizes that do not divide.

    >>> found = eplb(np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]]), slots=16, devices=8, groups=4,
    ...              nodes=2)
    >>> found.phy2log[0].tolist()
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]

    Source: DeepSeek-AI, 2025, "Expert Parallelism Load Balancer"; written anew from what it does.
    """
    loads, _ = tables(list(np.asarray(load_LE)), devices, None, _WHERE)
    experts = len(loads[0])
    divides = {"slots": (slots, devices), "devices": (devices, nodes), "the experts": (experts, groups)}
    for what, (whole, part) in divides.items():
        if part < 1 or whole % part:
            fix = f"pass a multiple of {part}" if part > 0 else "pass at least 1"
            raise UsageError(word(what, got=whole, allowed=f"be a multiple of {part}", where=_WHERE, fix=fix))
    if slots < experts:
        raise UsageError(word("slots", got=slots, allowed=f"be at least {experts}", where=_WHERE, fix="pass more"))
    parts = (groups, nodes) if groups % nodes == 0 else (1, 1)
    rows = [_layer(load_E, slots, devices, *parts) for load_E in loads]
    phy2log = np.array([phy2log for phy2log, _ in rows])
    count = np.stack([np.bincount(row, minlength=experts) for row in phy2log])
    log2phy = np.full((len(rows), experts, count.max()), -1)
    for layer, (row, copy) in enumerate(rows):
        log2phy[layer, row, copy] = np.arange(slots)
    return Eplb(phy2log, log2phy, count, devices, nodes)


def _layer(load_E: np.ndarray, slots: int, devices: int, groups: int, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """The expert of each slot, and which of its copies it is."""
    size = len(load_E) // groups
    in_node_N = _pack(load_E.reshape(groups, size).sum(1), nodes)
    experts_of, copies = [], []
    for members in in_node_N:
        mine = np.concatenate([np.arange(group * size, (group + 1) * size) for group in members])
        expert, copy = _replicate(load_E[mine], slots // nodes)
        weight = load_E[mine][expert] / np.bincount(expert)[expert]
        order = [slot for device in _pack(weight, devices // nodes) for slot in device]
        experts_of.append(mine[expert[order]])
        copies.append(copy[order])
    return np.concatenate(experts_of), np.concatenate(copies)


def _replicate(load_E: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    count_E = np.ones(len(load_E), dtype=np.int64)
    expert, copy = list(range(len(load_E))), [0] * len(load_E)
    for _ in range(slots - len(load_E)):
        busiest = int((load_E / count_E).argmax())
        expert.append(busiest)
        copy.append(int(count_E[busiest]))
        count_E[busiest] += 1
    return np.array(expert), np.array(copy)


def _pack(weight_N: np.ndarray, packs: int) -> list[list[int]]:
    """Equally many items in each pack, the heaviest first, each into the lightest pack with room."""
    if len(weight_N) == packs:
        return [[item] for item in range(packs)]
    inside: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in np.argsort(-weight_N, kind="stable").tolist():
        open_ = (pack for pack in range(packs) if len(inside[pack]) < len(weight_N) // packs)
        pack = min(open_, key=total.__getitem__)
        inside[pack].append(item)
        total[pack] += float(weight_N[item])
    return inside
