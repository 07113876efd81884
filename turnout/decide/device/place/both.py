"""Placement by load and affinity together: few steps change the device, and no device is busier than allowed."""

from collections.abc import Sequence

import numpy as np

from turnout.decide.device.place.by_affinity import by_affinity, checked_steps
from turnout.decide.device.place.by_load import by_load
from turnout.decide.device.place.slots import Slots, speeds, tables
from turnout.errors import UsageError, word
from turnout.solve import assignment
from turnout.types import Placement

__all__ = ["Joint", "both"]

_WHERE = "turnout.decide.device.place.both"
_ROUNDS, _SMALL = 20, 1_000_000


def both(
    load_LE: Sequence[np.ndarray],
    step_LEE: Sequence[np.ndarray],
    *,
    devices: int,
    slots: int | None = None,
    nodes: int = 1,
    balance: float = 1.05,
    speed_G: np.ndarray | None = None,
) -> Placement:
    """Min the weight of steps that change the device (and once more, if they change the node), with in each layer

        busiest device <= max(balance, what by_load reaches) x mean.

    It starts from ``by_load`` with its devices renamed layer by layer to fit, and, where experts have one copy, from
    ``by_affinity`` made even; where there is much to do (a million pairs of experts) only from the latter, if it can be
    made even. Copies of a layer change places while fewer steps cross and the limit holds; the better end counts.

    Args:
        load_LE: for each layer the load of its experts.
        step_LEE: between each two layers (E, E') how much goes from expert to expert.
        devices: G.
        slots: copies in a layer; None for one of each expert.
        nodes: machines.
        balance: how busy the busiest device of a layer may be, over the mean.
        speed_G: of each device, relative.

    Returns:
        The placement.

    Raises:
        UsageError: a limit below 1, loads and steps of different models.

    >>> load_LE = [np.array([4, 1, 3, 2]), np.array([4, 1, 3, 2])]
    >>> step_EE = np.array([[0, 0, 3, 1], [0, 1, 0, 0], [3, 0, 0, 0], [1, 0, 0, 1]])
    >>> placement = both(load_LE, [step_EE], devices=2, balance=1.0)
    >>> [int(load_LE[1][list(placement.on(1, device))].sum()) for device in range(2)]
    [5, 5]

    Source: the two aims are those of Go & Mahajan, 2025, "MoETuner", which clusters for one and then places for the
    other; here the second may still change the clusters.
    """
    if not isinstance(balance, int | float) or isinstance(balance, bool) or not balance >= 1:
        fix = "pass balance=1.05 for 5 % above the mean"
        raise UsageError(word("balance", got=balance, allowed="be at least 1", where=_WHERE, fix=fix))
    speed_G = speeds(speed_G, devices, _WHERE)
    steps, (loads, _) = checked_steps(step_LEE, devices, _WHERE), tables(list(load_LE), devices, slots, _WHERE)
    even = by_load(loads, devices=devices, slots=slots, speed_G=speed_G)
    best = _best(Joint(loads, steps, even, nodes, speed_G), float(balance), slots is None)
    return Placement.of([layer.held_GE for layer in best.layers], nodes=nodes)


def _best(start: "Joint", balance: float, single: bool) -> "Joint":
    steps, speed_G, nodes = start.steps, start.layers[0].speed_G, start.nodes
    limit_L = [max(balance, layer.worst) * (1 + 1e-9) for layer in start.layers]
    ends = []
    if single:
        placed = by_affinity(steps, devices=len(speed_G), nodes=nodes, kicks=0)
        near = Joint([layer.load_E for layer in start.layers], steps, placed, nodes, speed_G)
        ends += [near] if near.even(limit_L) else []
    if not ends or sum(map(np.size, steps)) <= _SMALL:
        if np.ptp(speed_G) == 0:
            start.rename()
        ends.append(start)
    for end in ends:
        end.improve(limit_L)
    return min(ends, key=lambda one: one.crossing)


class Joint:
    """All layers' slots while a search moves copies about, with the steps between them. A mutable working table.

    Args:
        loads: of each layer.
        steps: between layers.
        placement: where to start.
        nodes: machines.
        speed_G: of each device.
    """

    def __init__(
        self,
        loads: list[np.ndarray],
        steps: list[np.ndarray],
        placement: Placement,
        nodes: int,
        speed_G: np.ndarray,
    ) -> None:
        self.steps, self.nodes = steps, nodes
        self.layers = [Slots(load_E, placement.held(layer), speed_G) for layer, load_E in enumerate(loads)]
        node_G = np.arange(len(speed_G)) * nodes // len(speed_G)
        # What a step is worth that ends on device h when it came from g: 1 for the device, and 1 more for the node.
        self.near_GG = np.eye(len(speed_G)) + (0.0 if nodes == 1 else 1.0) * (node_G[:, None] == node_G[None])

    def share(self, layer: int) -> np.ndarray:
        """(G, E) the part of an expert's tokens that each device gets."""
        return self.layers[layer].held_GE / self.layers[layer].count_E

    @property
    def crossing(self) -> float:
        """The weight of steps, less what stays."""
        pairs = (self.near_GG @ self.share(layer) @ step_EE for layer, step_EE in enumerate(self.steps))
        return -sum(float((near * self.share(layer + 1)).sum()) for layer, near in enumerate(pairs))

    def gain(self, layer: int) -> np.ndarray:
        """(G, E) what stays of a copy's steps if it lies on a device, the other layers being as they are."""
        total = np.zeros(self.layers[layer].held_GE.shape)
        if layer:
            total += self.near_GG @ self.share(layer - 1) @ self.steps[layer - 1]
        if layer < len(self.steps):
            total += self.near_GG @ self.share(layer + 1) @ self.steps[layer].T
        return total / self.layers[layer].count_E

    def rename(self) -> None:
        """Gives the devices of each layer the names under which most comes to them from the layer before."""
        for layer, step_EE in enumerate(self.steps):
            held_GE = self.layers[layer + 1].held_GE
            flow_GG = self.near_GG @ self.share(layer) @ step_EE @ self.share(layer + 1).T
            full_G = held_GE.sum(1)
            alike_GG = full_G[:, None] == full_G[None]  # only devices with as many slots may exchange their names
            cost_GG = np.where(alike_GG, flow_GG, -flow_GG.sum() - 1)
            self.layers[layer + 1].held_GE = held_GE[assignment(cost_GG, maximize=True).column_M]
            self.layers[layer + 1].refresh()

    def even(self, limit_L: Sequence[float]) -> bool:
        """Exchanges copies of the busiest devices until the limits hold; whether they do."""
        for layer, limit in zip(self.layers, limit_L, strict=True):
            while layer.worst > limit:
                device = int(layer.time_G.argmax())
                after, expert, other, instead = layer.best_swap(device)
                if after >= layer.worst * (1 - 1e-9):
                    return False
                layer.swap(device, expert, other, instead)
        return True

    def improve(self, limit_L: Sequence[float]) -> None:
        """Lets pairs of copies change places, layer by layer, while more stays and the limits hold."""
        waiting = set(range(len(self.layers)))
        for _ in range(_ROUNDS):
            for number in sorted(waiting):
                waiting.discard(number)
                if self._exchange(number, limit_L[number]):
                    waiting |= {number - 1, number + 1} & set(range(len(self.layers)))
            if not waiting:
                return

    def _exchange(self, number: int, limit: float) -> bool:
        layer, gain_GE, changed = self.layers[number], self.gain(number), False
        while True:
            worth_PP, device_P, expert_P = self.pairs(layer, gain_GE, limit)
            taken, best_P = np.zeros(len(layer.held_GE), dtype=bool), worth_PP.argmax(1)
            worth_P = worth_PP[np.arange(len(best_P)), best_P]
            for a in np.argsort(-worth_P, kind="stable").tolist():
                b = int(best_P[a])
                if worth_P[a] <= 1e-9:
                    break
                if not taken[device_P[a]] and not taken[device_P[b]]:
                    layer.swap(int(device_P[a]), int(expert_P[a]), int(device_P[b]), int(expert_P[b]))
                    taken[[device_P[a], device_P[b]]] = True
            if not taken.any():
                return changed
            changed = True

    @staticmethod
    def pairs(layer: Slots, gain_GE: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What more stays if two copies change places, -inf where they may not; each copy's device and expert."""
        device_P, expert_P = np.nonzero(layer.held_GE)
        to_PP = gain_GE[device_P][:, expert_P]  # row: the device, column: the expert that would come there
        own_P = np.diagonal(to_PP)
        worth_PP = to_PP + to_PP.T - own_P[:, None] - own_P[None]
        load_P = layer.share_E[expert_P]
        after_PP = layer.time_G[device_P][:, None] + (load_P[None] - load_P[:, None]) / layer.speed_G[device_P][:, None]
        most = limit * layer.even
        fits_PP = (after_PP <= most) & ~layer.held_GE[device_P][:, expert_P]
        return np.where(fits_PP & fits_PP.T, worth_PP, -np.inf), device_P, expert_P
