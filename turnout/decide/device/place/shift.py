"""Re-planning by load and affinity under a budget of moves: the exchanges of ``both``, the most useful ones first."""

import heapq
from collections.abc import Sequence

import numpy as np

from turnout.decide.device.place.both import Joint
from turnout.decide.device.place.by_affinity import checked_steps
from turnout.decide.device.place.replan import replan
from turnout.decide.device.place.slots import speeds
from turnout.types import Placement

__all__ = ["shift"]

_WHERE = "turnout.decide.device.place.shift"


def shift(
    before: Placement,
    load_LE: Sequence[np.ndarray],
    step_LEE: Sequence[np.ndarray],
    *,
    moves: float = 0.1,
    balance: float = 1.05,
    speed_G: np.ndarray | None = None,
) -> Placement:
    """The placement that few moves from ``before`` lead to: first even enough, then with few steps that cross.

    ``replan`` with a goal of ``balance`` goes first. What is left of the budget goes to exchanges of two copies of a
    layer, always to the one after which most steps stay, of those that keep every layer's busiest device at the limit.

    Args:
        before: where the experts are.
        load_LE: for each layer the load of its experts now.
        step_LEE: between each two layers (E, E') how much goes from expert to expert now.
        moves: how many copies may travel, of all that there are.
        balance: how busy the busiest device of a layer may be, over the mean; ``math.inf`` where load does not matter.
        speed_G: of each device, relative.

    Returns:
        The placement; ``before.moved`` says what travels.

    Raises:
        UsageError: a budget that is no share, or traffic of another model.

    >>> from turnout.types import Traffic
    >>> before, load_E = Placement.contiguous([4, 4], devices=2), np.ones(4)
    >>> step_EE = np.eye(4)[[2, 1, 0, 3]]
    >>> after = shift(before, [load_E, load_E], [step_EE], moves=0.25)
    >>> Traffic((load_E, load_E), (step_EE,)).crossing(after), len(before.moved(after).copies)
    (0.0, 2)

    Source: none; see ``both`` and ``replan``.
    """
    even = replan(before, load_LE, moves=moves, goal=balance, speed_G=speed_G)
    speed_G = speeds(speed_G, before.devices, _WHERE)
    joint = Joint(list(load_LE), checked_steps(step_LEE, before.devices, _WHERE), even, before.nodes, speed_G)
    limit_L = [max(balance, layer.worst) * (1 + 1e-9) for layer in joint.layers]
    _exchange(joint, before, limit_L, int(moves * before.slots + 1e-9) - len(before.moved(even).copies))
    return Placement.of([layer.held_GE for layer in joint.layers], nodes=before.nodes, layers=before.layers)


def _exchange(joint: Joint, before: Placement, limit_L: list[float], left: int) -> None:
    """The most useful exchanges of all layers, one by one, until no move is left."""
    old_LGE = [before.held(layer) for layer in range(before.num_layers)]
    age_L = [0] * len(old_LGE)
    queue = [_best(joint, number, limit_L[number], 0) for number in range(len(old_LGE))]
    heapq.heapify(queue)
    while queue and left > 0:
        worth, number, age, swap = heapq.heappop(queue)
        if -worth <= 1e-9:
            break
        if age < age_L[number]:  # a neighbour has changed since
            heapq.heappush(queue, _best(joint, number, limit_L[number], age_L[number]))
            continue
        layer, old_GE = joint.layers[number], old_LGE[number]
        used = int((layer.held_GE & ~old_GE).sum())
        layer.swap(*swap)
        more = int((layer.held_GE & ~old_GE).sum()) - used
        if more > left:
            device, expert, other, instead = swap
            layer.swap(device, instead, other, expert)
            continue
        left -= more
        for near in {number - 1, number, number + 1} & set(range(len(old_LGE))):
            age_L[near] += 1
        heapq.heappush(queue, _best(joint, number, limit_L[number], age_L[number]))


def _best(joint: Joint, number: int, limit: float, age: int) -> tuple[float, int, int, tuple[int, int, int, int]]:
    """The exchange of a layer after which most stays."""
    worth_PP, device_P, expert_P = joint.pairs(joint.layers[number], joint.gain(number), limit)
    a, b = np.unravel_index(worth_PP.argmax(), worth_PP.shape)
    return (
        -float(worth_PP[a, b]),
        number,
        age,
        (int(device_P[a]), int(expert_P[a]), int(device_P[b]), int(expert_P[b])),
    )
