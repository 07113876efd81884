"""ExFlow: the placement by affinity as one integer program, solved exactly where it is small."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from turnout.decide.device.place.by_affinity import checked_steps
from turnout.decide.device.place.slots import capacities
from turnout.errors import UsageError, word
from turnout.solve import milp
from turnout.types import Placement

__all__ = ["Solved", "exflow"]

_WHERE = "turnout.decide.device.place.exflow"


@dataclasses.dataclass(frozen=True)
class Solved:
    """A placement with what the solver proved of it.

    Args:
        placement: the best found.
        crossing: the share of steps that change the device.
        bound: no placement of this kind has a lower share.
        optimal: whether that is proved.

    >>> Solved(Placement.contiguous([2, 2], devices=2), crossing=0.3, bound=0.2, optimal=False).bound
    0.2

    Source: none; plain bookkeeping.
    """

    placement: Placement
    crossing: float
    bound: float
    optimal: bool


def exflow(step_LEE: Sequence[np.ndarray], *, devices: int, seconds: float = 60.0) -> Solved:
    """Min sum_l sum_ef step_l[e, f] cost_lef: x in {0, 1}, each expert on one device, each device as many of a layer.

    cost_lef >= x_leg - x_(l+1)fg for every device g. Exact and slow: 16 experts on 4 devices in 6 layers are beyond it.

    Args:
        step_LEE: between each two layers (E, E') how much goes from expert to expert.
        devices: G.
        seconds: how long the solver may take.

    Returns:
        The placement, and a bound on all.

    Raises:
        UsageError: steps that do not fit, or no placement found in that time.

    >>> exflow([np.array([[0.0, 5.0], [4.0, 1.0]])], devices=2).crossing
    0.1

    Source: Yao et al., 2024, "Exploiting Inter-Layer Expert Affinity for Accelerating Mixture-of-Experts Model
    Inference". Counts are added up over tokens, which leaves the program's optimum as it is; HiGHS in place of Gurobi,
    and no recursive bisection.
    """
    from scipy.sparse import coo_array

    steps = checked_steps(step_LEE, devices, _WHERE)
    sizes = [len(steps[0]), *(step_EE.shape[1] for step_EE in steps)]
    first_L = np.concatenate([[0], np.cumsum(sizes)]) * devices
    pairs = [np.argwhere(step_EE > 0) for step_EE in steps]
    cost = np.concatenate([np.zeros(first_L[-1]), *(step_EE[step_EE > 0] for step_EE in steps)])
    rows: list[tuple[list[int], list[float], float, float]] = []
    for layer, experts in enumerate(sizes):
        x_EG = first_L[layer] + np.arange(experts * devices).reshape(experts, devices)
        rows += [(list(x_G), [1.0] * devices, 1, 1) for x_G in x_EG]
        for room, x_E in zip(capacities(experts, devices), x_EG.T, strict=True):
            rows.append((list(x_E), [1.0] * experts, room, room))
    place = int(first_L[-1])
    for layer, pair in enumerate(pairs):
        for e, f in pair:
            left, right = first_L[layer] + e * devices, first_L[layer + 1] + f * devices
            rows += [([place, left + g, right + g], [1.0, -1.0, 1.0], 0, np.inf) for g in range(devices)]
            place += 1
    row = np.repeat(np.arange(len(rows)), [len(one[0]) for one in rows])
    entries = np.concatenate([one[1] for one in rows]), (row, np.concatenate([one[0] for one in rows]).astype(int))
    low, high = (np.array([one[side] for one in rows]) for side in (2, 3))
    integer_N = np.arange(len(cost)) < first_L[-1]
    table = coo_array(entries, shape=(len(rows), len(cost))).tocsr()
    found = milp(cost, table, low, high, integer_N=integer_N, seconds=seconds)
    if found.x_N is None:
        got, fix = f"none within {seconds} s", "use by_affinity, or give it more seconds"
        raise UsageError(word("the placement", got=got, allowed="be found", where=_WHERE, fix=fix))
    x_N, total = found.x_N[: first_L[-1]], sum(step_EE.sum() for step_EE in steps) or 1.0
    tables = [x_N[a:b].reshape(-1, devices).T > 0.5 for a, b in itertools.pairwise(first_L)]
    value, bound = float(found.value / total), float(max(found.bound, 0.0) / total)
    return Solved(Placement.of(tables), value, value if found.optimal else bound, found.optimal)
