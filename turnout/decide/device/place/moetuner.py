"""MoETuner: first clusters of experts of even load in each layer, then the device of each cluster; two programs."""

from collections.abc import Sequence

import numpy as np

from turnout.decide.device.place.by_affinity import checked_steps
from turnout.decide.device.place.by_load import by_load
from turnout.decide.device.place.slots import capacities, tables
from turnout.errors import UsageError, word
from turnout.solve import assignment, milp
from turnout.types import Placement

__all__ = ["moetuner"]

_WHERE = "turnout.decide.device.place.moetuner"
_LISTED = 64  # experts x devices of a layer up to which the first program is given to the solver


def moetuner(
    load_LE: Sequence[np.ndarray],
    step_LEE: Sequence[np.ndarray],
    *,
    devices: int,
    nodes: int = 1,
    seconds: float = 10.0,
) -> Placement:
    """One copy of each expert: clusters of one size whose loads differ least, on devices that their tokens go on to.

    (1) In each layer min max_c |load of cluster c - mean|: an integer program up to 64 experts x devices, above that
    ``by_load``. (2) Clusters to devices, one to one in each layer, min sum traffic(c, c') distance(g, g'), with a
    distance of 0 on a device, 1 in a node, 2 between nodes. With one node that falls apart into an assignment between
    each two layers, which is solved exactly; with several it is a program over all layers.

    Args:
        load_LE: for each layer the load of its experts.
        step_LEE: between each two layers (E, E') how much goes from expert to expert.
        devices: G; divides the experts of each layer.
        nodes: machines.
        seconds: how long the solver may take for each program.

    Returns:
        The placement.

    Raises:
        UsageError: devices that do not divide the experts, or loads and steps of different models.

    >>> load_LE = [np.array([4, 1, 3, 2]), np.array([4, 1, 3, 2])]
    >>> step_EE = np.array([[0, 0, 4, 0], [0, 0, 0, 1], [3, 0, 0, 0], [0, 2, 0, 0]])
    >>> placement = moetuner(load_LE, [step_EE], devices=2)
    >>> placement.on(0, 0), placement.on(1, 0)
    ((0, 1), (2, 3))

    Source: Go & Mahajan, 2025, "MoETuner: Optimized Mixture of Expert Serving with Balanced Expert Placement and Token
    Routing"; the programs' structure, with the distance for its measured costs.
    """
    steps, (loads, _) = checked_steps(step_LEE, devices, _WHERE), tables(list(load_LE), devices, None, _WHERE)
    sizes = [len(load_E) for load_E in loads]
    if [len(steps[0]), *(step_EE.shape[1] for step_EE in steps)] != sizes or any(size % devices for size in sizes):
        got, fix = f"{sizes} experts on {devices} devices", "pass the loads and steps of one trace, and such devices"
        allowed = "be the same in load_LE and step_LEE, and a multiple of the devices"
        raise UsageError(word("the experts", got=got, allowed=allowed, where=_WHERE, fix=fix))
    cluster_LE = [_clusters(load_E, devices, seconds) for load_E in loads]
    one_CC = np.eye(devices)
    flow_LCC = [
        one_CC[left_E].T @ step_EE @ one_CC[right_E]
        for step_EE, left_E, right_E in zip(steps, cluster_LE, cluster_LE[1:], strict=False)
    ]
    one_level = nodes in (1, devices)
    device_LC = _chained(flow_LCC) if one_level else _joint(flow_LCC, devices, nodes, seconds)
    device_LE = [device_C[cluster_E] for device_C, cluster_E in zip(device_LC, cluster_LE, strict=True)]
    return Placement.of([np.eye(devices, dtype=bool)[:, device_E] for device_E in device_LE], nodes=nodes)


def _clusters(load_E: np.ndarray, devices: int, seconds: float) -> np.ndarray:
    """(E,) the cluster of each expert."""
    experts, start = len(load_E), by_load([load_E], devices=devices)
    packed_E = np.array(start.device[0])[np.argsort(start.phy2log[0])]
    if experts * devices > _LISTED:
        return packed_E
    x_EC = np.arange(experts * devices).reshape(experts, devices)
    rows, low, high = [], [], []

    def row(columns: np.ndarray, values: np.ndarray | float, extra: float, least: float, most: float) -> None:
        line = np.zeros(experts * devices + 1)
        line[columns], line[-1] = values, extra
        rows.append(line), low.append(least), high.append(most)

    scale = load_E.sum() / devices or 1.0
    for expert in range(experts):
        row(x_EC[expert], 1.0, 0.0, 1, 1)
    for cluster, room in enumerate(capacities(experts, devices)):
        row(x_EC[:, cluster], 1.0, 0.0, room, room)
        row(x_EC[:, cluster], load_E / scale, 1.0, 1, np.inf)
        row(x_EC[:, cluster], load_E / scale, -1.0, -np.inf, 1)
    upper_N = np.append(np.ones(experts * devices), np.inf)
    upper_N[x_EC[0, 1:]] = 0  # clusters have no names yet: the first expert is in the first
    cost_N, integer_N = np.append(np.zeros(experts * devices), 1.0), np.append(np.ones(experts * devices, bool), False)
    found = milp(cost_N, np.array(rows), np.array(low), np.array(high), integer_N=integer_N, upper_N=upper_N,
                 seconds=seconds)  # fmt: skip
    return packed_E if found.x_N is None else found.x_N[:-1].reshape(experts, devices).argmax(1)


def _chained(flow_LCC: list[np.ndarray]) -> list[np.ndarray]:
    """(C,) a layer: the device of each cluster. What is one device for two layers is a matching of their clusters."""
    device_LC = [np.arange(len(flow_LCC[0]))]
    for flow_CC in flow_LCC:
        came_from_C = assignment(flow_CC.T, maximize=True).column_M
        device_LC.append(device_LC[-1][came_from_C])
    return device_LC


def _joint(flow_LCC: list[np.ndarray], devices: int, nodes: int, seconds: float) -> list[np.ndarray]:
    """The same with distances on two levels: y picks devices, z >= 0 is the product of the y of two layers."""
    from scipy.sparse import coo_array

    distance = np.array([[(g != h) + (g * nodes // devices != h * nodes // devices) for h in range(devices)]
                         for g in range(devices)], dtype=float)  # fmt: skip
    layers, square = len(flow_LCC) + 1, devices * devices
    y_LCG = np.arange(layers * square).reshape(layers, devices, devices)
    z_LCCGG = layers * square + np.arange(len(flow_LCC) * square**2).reshape(-1, *[devices] * 4)
    groups: list[tuple[np.ndarray, list[float], float]] = []
    for layer in range(layers):
        groups += [(columns, [1.0] * devices, 1.0) for y in (y_LCG[layer], y_LCG[layer].T) for columns in y]
    for layer, z_CCGG in enumerate(z_LCCGG):
        for c, d, g in np.ndindex(devices, devices, devices):
            for z_G, y in ((z_CCGG[c, d, g], y_LCG[layer, c, g]), (z_CCGG[c, d, :, g], y_LCG[layer + 1, d, g])):
                groups.append((np.append(z_G, y), [1.0] * devices + [-1.0], 0.0))
    row = np.repeat(np.arange(len(groups)), [len(one[0]) for one in groups])
    entries = np.concatenate([one[1] for one in groups]), (row, np.concatenate([one[0] for one in groups]))
    cost = np.concatenate(
        [np.zeros(layers * square), *(np.multiply.outer(flow, distance).ravel() for flow in flow_LCC)]
    )
    upper = np.ones(len(cost))
    upper[y_LCG[0, 0, 1:]] = 0
    side = np.array([one[2] for one in groups])
    rows = coo_array(entries, shape=(len(groups), len(cost))).tocsr()
    integer_N = np.arange(len(cost)) < layers * square
    found = milp(cost, rows, side, side, integer_N=integer_N, upper_N=upper, seconds=seconds)
    if found.x_N is None:
        return _chained(flow_LCC)
    return [y_CG.argmax(1) for y_CG in found.x_N[: layers * square].reshape(layers, devices, devices)]
