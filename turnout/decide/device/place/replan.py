"""Re-planning under a budget of moves: a placement of yesterday, made even for today's load by few copies' travel."""

import heapq
from collections.abc import Sequence

import numpy as np

from turnout.decide.device.place.slots import Slots, speeds
from turnout.errors import UsageError, word
from turnout.types import Placement

__all__ = ["replan"]

_WHERE = "turnout.decide.device.place.replan"


def replan(
    before: Placement,
    load_LE: Sequence[np.ndarray],
    *,
    moves: float = 0.1,
    goal: float = 1.004,
    speed_G: np.ndarray | None = None,
) -> Placement:
    """The placement that few moves from ``before`` lead to, and whose busiest devices are busy least.

    The layer whose busiest device is the furthest above the mean goes first. That device exchanges a copy with another
    (two moves), or has one of its experts copied to where a spare copy gives way (one move), or three copies go round
    between it, another busy device and an idle one (three moves for two devices): the cheapest that reaches a goal,
    else what helps most. It ends when nothing helps, when all layers are at the goal, or when no move
    is left.

    Args:
        before: where the experts are.
        load_LE: for each layer the load of its experts now.
        moves: how many copies may travel, of all that there are.
        goal: busiest device over mean at which a layer is left alone.
        speed_G: of each device, relative.

    Returns:
        The placement; ``before.moved`` says what travels.

    Raises:
        UsageError: a budget that is no share, or loads of another model.

    >>> before = Placement.contiguous([4], devices=2)
    >>> after = replan(before, [np.array([3, 3, 1, 1])], moves=0.5)
    >>> after.on(0, 0), after.on(0, 1), len(before.moved(after).copies)
    ((1, 2), (0, 3), 2)

    Source: none; the churn of EPLB (DeepSeek-AI, 2025), which starts anew at each call, is what it avoids.
    """
    if not isinstance(moves, int | float) or isinstance(moves, bool) or not 0 <= moves <= 1:
        fix = "pass moves=0.1 for a tenth of the copies"
        raise UsageError(word("moves", got=moves, allowed="be a share from 0 to 1", where=_WHERE, fix=fix))
    if tuple(map(len, load_LE)) != before.num_experts_L:
        got, fix = f"{tuple(map(len, load_LE))} experts", "pass the traffic of the model that was placed"
        allowed = f"be of {before.num_experts_L} experts"
        raise UsageError(word("load_LE", got=got, allowed=allowed, where=_WHERE, fix=fix))
    speed_G = speeds(speed_G, before.devices, _WHERE)
    held_LGE = [before.held(layer) for layer in range(before.num_layers)]
    layers = [Slots(load_E, held_GE, speed_G) for load_E, held_GE in zip(load_LE, held_LGE, strict=True)]
    left = int(moves * before.slots + 1e-9)
    queue = [(-layer.worst, number) for number, layer in enumerate(layers)]
    heapq.heapify(queue)
    while queue and left > 0:
        worst, number = heapq.heappop(queue)
        if -worst <= goal:
            break
        layer, old_GE = layers[number], held_LGE[number]
        used = int((layer.held_GE & ~old_GE).sum())
        if _step(layer, goal, left + used, old_GE):
            left -= int((layer.held_GE & ~old_GE).sum()) - used
            heapq.heappush(queue, (-layer.worst, number))
    return Placement.of([layer.held_GE for layer in layers], nodes=before.nodes, layers=before.layers)


def _step(layer: Slots, goal: float, budget: int, old_GE: np.ndarray) -> bool:
    """Does what helps the busiest device, if anything does and leaves no more than ``budget`` copies elsewhere."""
    device, held_GE = int(layer.time_G.argmax()), layer.held_GE.copy()
    worst = layer.worst
    if (round_ := layer.best_cycle(device, goal)) is not None:
        layer.cycle(device, *round_)
        if int((layer.held_GE & ~old_GE).sum()) <= budget:
            return True
        layer.held_GE = held_GE.copy()
        layer.refresh()
    found = []
    for kind, (after, come, other, gone) in (
        ("replace", layer.best_replacement(device)),
        ("swap", layer.best_swap(device)),
    ):
        if after < worst * (1 - 1e-6):
            found.append((max(after, goal), 1 if kind == "replace" else 2, kind, come, other, gone))
    for *_, kind, come, other, gone in sorted(found):
        if kind == "swap":
            layer.swap(device, come, other, gone)
        else:
            layer.replace(other, gone, come)
        if int((layer.held_GE & ~old_GE).sum()) <= budget:
            return True
        layer.held_GE = held_GE.copy()
        layer.refresh()
    return False
