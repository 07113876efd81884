"""Placement by affinity: experts of following layers that share tokens share a device, each device holding as many."""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from turnout.decide.device.place.slots import capacities
from turnout.errors import UsageError, word
from turnout.solve import assignment, chain
from turnout.types import Placement

__all__ = ["by_affinity", "checked_steps", "crossing_weight", "ways"]

_WHERE = "turnout.decide.device.place.by_affinity"
_WAYS = 3000  # up to so many ways to fill a layer's devices, all are looked at


def by_affinity(
    step_LEE: Sequence[np.ndarray],
    *,
    devices: int,
    nodes: int = 1,
    kicks: int | None = None,
    seed: int = 0,
) -> Placement:
    """One copy of each expert, as many on each device, so that few steps between layers change the device.

    A layer is only tied to the one before and the one after. Where the ways to fill one layer's devices can be listed
    (up to 3,000: 8 experts on 4 devices) the best of all placements comes from dynamic programming over the layers.
    Else layers are placed in turn, each in the best way for its neighbours as they are, an exact assignment; then from
    each layer on the devices are renamed to fit those before; until neither helps. The best of up to 32 starts is kept.
    Then a stretch of layers is disturbed and the same done again, ``kicks`` times, keeping what is better.

    Args:
        step_LEE: between each two layers (E, E') how much goes from expert to expert, at least 0.
        devices: G.
        nodes: machines; where there are several, experts are placed on nodes first, then within each node.
        kicks: how often it is disturbed; None for as often as takes about as long whatever the size.
        seed: of what is disturbed.

    Returns:
        The placement.

    Raises:
        UsageError: steps that do not fit each other, or fewer experts than devices.

    >>> placement = by_affinity([np.array([[0.0, 5.0], [4.0, 1.0]])], devices=2)
    >>> placement.on(0, 0), placement.on(1, 0)
    ((1,), (0,))

    Source: the objective is that of Yao et al., 2024, "Exploiting Inter-Layer Expert Affinity" (ExFlow), whose integer
    program it replaces; disturbing a local optimum is Lourenco, Martin & Stutzle, 2003, "Iterated Local Search".
    """
    steps = checked_steps(step_LEE, devices, _WHERE)
    sizes = [len(steps[0]), *(step_EE.shape[1] for step_EE in steps)]
    room = [capacities(experts, devices) for experts in sizes]
    rng = np.random.default_rng(seed)
    if nodes == 1 or nodes == devices:
        device_LE = _solve(steps, room, kicks, rng)
    else:
        device_LE = _nested(steps, room, nodes, kicks, rng)
    one_GG = np.eye(devices, dtype=bool)
    return Placement.of([one_GG[:, device_E] for device_E in device_LE], nodes=nodes)


def checked_steps(step_LEE: Sequence[np.ndarray], devices: int, where: str) -> list[np.ndarray]:
    """The steps in fp64.

    Raises:
        UsageError: they do not fit each other, or the devices.
    """
    steps = [np.asarray(step_EE, dtype=float) for step_EE in step_LEE]
    chained = all(one.shape[1] == other.shape[0] for one, other in itertools.pairwise(steps))
    if not steps or not chained or any((one < 0).any() or not np.isfinite(one).all() for one in steps):
        got = f"tables of shapes {[one.shape for one in steps]}"
        fix, allowed = (
            "pass traffic.step_LEE of a trace of two layers or more",
            "lead from layer to layer, none below 0",
        )
        raise UsageError(word("step_LEE", got=got, allowed=allowed, where=where, fix=fix))
    fewest = min(min(one.shape) for one in steps)
    if not 1 <= devices <= fewest:
        fix = f"pass devices={fewest}"
        raise UsageError(word("devices", got=devices, allowed=f"be from 1 to {fewest}", where=where, fix=fix))
    return steps


def crossing_weight(steps: Sequence[np.ndarray], device_LE: Sequence[np.ndarray]) -> float:
    """The weight of steps that change the device."""
    pairs = zip(steps, device_LE, device_LE[1:], strict=False)
    return float(sum(step_EE[left_E[:, None] != right_E[None]].sum() for step_EE, left_E, right_E in pairs))


def ways(room_G: np.ndarray) -> int:
    """In how many ways a layer's devices can be filled."""
    total = math.factorial(int(room_G.sum()))
    return total // math.prod(math.factorial(int(room)) for room in room_G)


def _solve(
    steps: list[np.ndarray], room: list[np.ndarray], kicks: int | None, rng: np.random.Generator
) -> list[np.ndarray]:
    if max(map(ways, room)) <= _WAYS:
        return _best_of_all(steps, room)
    entries = sum(map(np.size, steps))
    count = min(32, max(1, 4_000_000 // entries))
    starts = [_settle(steps, room, _forward(steps, room, rng), range(len(room))) for _ in range(count)]
    best = min(starts, key=lambda one: crossing_weight(steps, one))
    least = crossing_weight(steps, best)
    for _ in range(min(2000, 40_000_000 // entries) if kicks is None else kicks):
        tried, first, stop = _disturbed(best, rng)
        tried = _settle(steps, room, tried, range(first, stop))
        weight = crossing_weight(steps, tried)
        if weight <= least:
            best, least = tried, weight
    return best


def _best_of_all(steps: list[np.ndarray], room: list[np.ndarray]) -> list[np.ndarray]:
    listed: dict[tuple[int, ...], np.ndarray] = {}
    for room_G in room:
        listed.setdefault(tuple(room_G.tolist()), _listed(room_G))
    fills = [listed[tuple(room_G.tolist())] for room_G in room]

    def kept(layer: int) -> np.ndarray:
        devices = np.arange(len(room[layer]))[:, None]
        left_SGE, right_SGE = (fills[one][:, None] == devices for one in (layer, layer + 1))
        through = left_SGE.astype(float) @ steps[layer]
        return through.reshape(len(through), -1) @ right_SGE.reshape(len(right_SGE), -1).T

    found = chain([len(fill) for fill in fills], kept)
    return [fill[choice] for fill, choice in zip(fills, found.column_M, strict=True)]


def _listed(room_G: np.ndarray) -> np.ndarray:
    """(ways, E) every way to give each expert a device that has room."""
    filled = [((), tuple(room_G.tolist()))]
    for _ in range(int(room_G.sum())):
        filled = [
            ((*device_E, g), (*room[:g], room[g] - 1, *room[g + 1 :]))
            for device_E, room in filled
            for g in range(len(room))
            if room[g]
        ]
    return np.array([device_E for device_E, _ in filled])


def _forward(steps: list[np.ndarray], room: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """A start: the first layer at random, then each layer in the best way for the one before."""
    devices = len(room[0])
    device_LE = [rng.permutation(np.repeat(np.arange(devices), room[0]))]
    for step_EE, room_G in zip(steps, room[1:], strict=True):
        gain_EG = step_EE.T @ np.eye(devices)[device_LE[-1]]
        device_LE.append(_fill(gain_EG, room_G))
    return device_LE


def _fill(gain_EG: np.ndarray, room_G: np.ndarray) -> np.ndarray:
    seat_P = np.repeat(np.arange(len(room_G)), room_G)
    return seat_P[assignment(gain_EG[:, seat_P], maximize=True).column_M]


def _settle(
    steps: list[np.ndarray], room: list[np.ndarray], device_LE: list[np.ndarray], first: range
) -> list[np.ndarray]:
    """Layer by layer in the best way for its neighbours, and renamed from each layer on, until nothing helps."""
    device_LE, one_GG = list(device_LE), np.eye(len(room[0]))
    waiting = set(first)
    while waiting:
        while waiting:
            for layer in sorted(waiting):
                waiting.discard(layer)
                gain_EG = np.zeros((len(device_LE[layer]), len(one_GG)))
                if layer:
                    gain_EG += steps[layer - 1].T @ one_GG[device_LE[layer - 1]]
                if layer < len(steps):
                    gain_EG += steps[layer] @ one_GG[device_LE[layer + 1]]
                filled_E, rows = _fill(gain_EG, room[layer]), np.arange(len(gain_EG))
                if gain_EG[rows, filled_E].sum() > gain_EG[rows, device_LE[layer]].sum() * (1 + 1e-12):
                    device_LE[layer] = filled_E
                    waiting |= {layer - 1, layer + 1} & set(range(len(room)))
        waiting = _renamed(steps, room, device_LE)
    return device_LE


def _renamed(steps: list[np.ndarray], room: list[np.ndarray], device_LE: list[np.ndarray]) -> set[int]:
    """Gives the devices other names from a layer on, where more stays then; returns the layers at such places."""
    one_GG, changed = np.eye(len(room[0])), set()
    if any(len(set(room_G.tolist())) > 1 for room_G in room):
        return changed  # devices that hold more would have to keep their names
    for layer, step_EE in enumerate(steps):
        flow_GG = one_GG[device_LE[layer]].T @ step_EE @ one_GG[device_LE[layer + 1]]
        name_G = assignment(flow_GG.T, maximize=True)
        if name_G.value > np.trace(flow_GG) * (1 + 1e-12):
            for later in range(layer + 1, len(room)):
                device_LE[later] = name_G.column_M[device_LE[later]]
            changed |= {layer, layer + 1}
    return changed


def _disturbed(device_LE: list[np.ndarray], rng: np.random.Generator) -> tuple[list[np.ndarray], int, int]:
    """Two devices exchange some of their experts in a stretch of layers."""
    layers, device_LE = len(device_LE), [device_E.copy() for device_E in device_LE]
    length = int(rng.integers(1, min(4, layers) + 1))
    first = int(rng.integers(0, layers - length + 1))
    a, b = rng.choice(int(device_LE[0].max()) + 1, 2, replace=False)
    for layer in range(first, first + length):
        here, there = (rng.permutation(np.nonzero(device_LE[layer] == g)[0]) for g in (a, b))
        some = int(rng.integers(1, min(len(here), len(there)) + 1))
        device_LE[layer][here[:some]], device_LE[layer][there[:some]] = b, a
    return device_LE, max(0, first - 1), min(layers, first + length + 1)


def _nested(
    steps: list[np.ndarray], room: list[np.ndarray], nodes: int, kicks: int | None, rng: np.random.Generator
) -> list[np.ndarray]:
    """On nodes first; then the experts of each node on its devices."""
    each = len(room[0]) // nodes
    node_LE = _solve(steps, [room_G.reshape(nodes, each).sum(1) for room_G in room], kicks, rng)
    device_LE = [np.zeros(len(node_E), dtype=np.int64) for node_E in node_LE]
    for node in range(nodes):
        mine = [np.nonzero(node_E == node)[0] for node_E in node_LE]
        inside = [step_EE[np.ix_(*pair)] for step_EE, *pair in zip(steps, mine, mine[1:], strict=False)]
        rooms = [room_G[node * each : (node + 1) * each] for room_G in room]
        for device_E, own, found in zip(device_LE, mine, _solve(inside, rooms, kicks, rng), strict=True):
            device_E[own] = node * each + found
    return device_LE
