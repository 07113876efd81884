"""Place the experts of a recorded trace on devices, write the placement with what it is worth, and check that later."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from turnout.decide.device import place
from turnout.errors import CheckpointError, UsageError, nearest, word
from turnout.measure import placement_report
from turnout.types import Placement, Report, Trace, Traffic

__all__ = ["WAYS", "Placed", "check_placement", "place_trace"]

_WHERE = "turnout place"
WAYS = ("both", "load", "affinity", "contiguous", "eplb", "exflow", "moetuner")
# Ways that make one copy of each expert, and those that start from an older placement.
_SINGLE, _REPLANS = ("affinity", "contiguous", "exflow", "moetuner"), ("both", "load", "affinity")


@dataclasses.dataclass(frozen=True)
class Placed:
    """A placement and what it is worth on its trace.

    Args:
        placement: the copies on devices.
        report: ``measure.placement_report`` of it.
        by: the way it was found.
        expert_bytes: what travels with each copy that moves.
        speed_G: of each device; empty for like ones.
        before: the placement that it came from.
        slots: copies that a layer had room for; None for as many as it has.

    >>> import numpy as np
    >>> told = Traffic((np.ones(2), np.ones(2)), (np.eye(2),))
    >>> found = Placement.contiguous([2, 2], devices=2)
    >>> Placed(found, placement_report(told, found), "contiguous").report["crossing"]
    0.0

    Source: none; plain bookkeeping.
    """

    placement: Placement
    report: Report
    by: str
    expert_bytes: float = 0.0
    speed_G: tuple[float, ...] = ()
    before: Placement | None = None
    slots: int | None = None

    @property
    def room(self) -> int | None:
        """The slots of all layers, those that stay empty too; None where as many were asked for as there are copies."""
        return None if self.slots is None else self.slots * self.placement.num_layers

    def save(self, path: str | Path) -> None:
        """Writes the placement with all that is said of it."""
        how = {"by": self.by, "expert_bytes": self.expert_bytes, "speed_G": self.speed_G}
        how |= {} if self.slots is None else {"slots": self.slots}
        before = {"before": self.before.digest} if self.before is not None else {}
        self.placement.save(path, stated={**how, **before, **self.report.context, "values": dict(self.report.values)})


def place_trace(
    trace: str | Path,
    *,
    devices: int,
    nodes: int = 1,
    slots: int | None = None,
    by: str = "both",
    balance: float = 1.05,
    before: Placement | None = None,
    moves: float = 0.1,
    expert_bytes: float = 0.0,
    speed_G: Sequence[float] = (),
) -> Placed:
    """Where the experts of a trace's model should lie.

    Args:
        trace: the folder, as ``turnout eval --trace`` writes it.
        devices: G.
        nodes: machines.
        slots: copies in a layer; None for one of each expert, or as many as ``before`` has.
        by: one of ``WAYS``.
        balance: for ``both``: how busy the busiest device of a layer may be, over the mean.
        before: a placement to start from; ``moves`` is the share of its copies that may travel.
        moves: see there.
        expert_bytes: what travels with each copy.
        speed_G: of each device, relative; empty for like ones.

    Returns:
        The placement and its report.

    Raises:
        TurnoutError: a trace that cannot be read, sizes that do not fit, a way that does not go with the rest.

    Source: none; ``decide.device.place``, with the file reading around it.
    """
    if by not in WAYS:
        raise nearest(by, WAYS, kind="way", where=_WHERE)
    traffic = Traffic.of(Trace.open(trace))
    _check(by, traffic, devices, nodes, slots, before, bool(speed_G))
    speed = np.array(speed_G) if speed_G else None
    if before is not None:
        limit = {"load": 1.004, "both": balance, "affinity": math.inf}[by]
        if by == "load":
            found = place.replan(before, traffic.load_LE, moves=moves, goal=limit, speed_G=speed)
        else:
            found = place.shift(before, traffic.load_LE, traffic.step_LEE, moves=moves, balance=limit, speed_G=speed)
    else:
        found = _new(by, traffic, devices, nodes, slots, balance, speed)
    found = dataclasses.replace(found, layers=traffic.layers, nodes=nodes)
    report = placement_report(traffic, found, before=before, expert_bytes=expert_bytes, speed_G=speed, slots=slots)
    return Placed(found, report, by, float(expert_bytes), tuple(map(float, speed_G)), before, slots)


def _new(
    by: str, traffic: Traffic, devices: int, nodes: int, slots: int | None, balance: float, speed: np.ndarray | None
) -> Placement:
    load_LE, step_LEE = traffic.load_LE, traffic.step_LEE
    if by == "contiguous":
        return Placement.contiguous(traffic.num_experts_L, devices=devices, nodes=nodes)
    if by == "load":
        return place.by_load(load_LE, devices=devices, slots=slots, nodes=nodes, speed_G=speed)
    if by == "eplb":
        wanted = slots or len(load_LE[0])
        return place.eplb(np.stack(load_LE), slots=wanted, devices=devices, nodes=nodes, groups=nodes).placement()
    if by == "affinity":
        return place.by_affinity(step_LEE, devices=devices, nodes=nodes)
    if by == "exflow":
        return place.exflow(step_LEE, devices=devices).placement
    if by == "moetuner":
        return place.moetuner(load_LE, step_LEE, devices=devices, nodes=nodes)
    return place.both(load_LE, step_LEE, devices=devices, slots=slots, nodes=nodes, balance=balance, speed_G=speed)


def _check(
    by: str,
    traffic: Traffic,
    devices: int,
    nodes: int,
    slots: int | None,
    before: Placement | None,
    has_speeds: bool,
) -> None:
    def refuse(what: str, got: object, allowed: str, fix: str) -> UsageError:
        return UsageError(word(what, got=got, allowed=allowed, where=_WHERE, fix=fix))

    if nodes < 1 or devices < 1 or devices % nodes:
        raise refuse("--nodes", f"{nodes} of {devices} devices", "divide the devices", "pass --nodes 1")
    if slots is not None and (by in _SINGLE or before is not None):
        allowed = "be left out where experts have one copy, or as many as before"
        raise refuse("--slots", f"{slots} with --by {by}", allowed, "leave --slots out, or use --by load")
    if has_speeds and by not in _REPLANS:
        raise refuse("--speeds", f"--by {by}", "go with a way that knows them", "use --by both or --by load")
    if not traffic.step_LEE and by not in ("load", "contiguous", "eplb"):
        got = f"a trace of one layer, and --by {by}"
        raise refuse("the trace", got, "have two layers for that", "use --by load")
    if before is None:
        return
    traffic.check(before)
    if by not in _REPLANS:
        raise refuse("--from", f"--by {by}", "go with a way that moves copies", "use --by both, load or affinity")
    if (before.devices, before.nodes) != (devices, nodes):
        got = f"{devices} devices in {nodes} nodes, from a placement on {before.devices} in {before.nodes}"
        fix = f"pass --devices {before.devices} --nodes {before.nodes}"
        raise refuse("--devices", got, "be those of --from", fix)


def check_placement(
    path: str | Path, trace: str | Path, *, before: str | Path | None = None
) -> tuple[tuple[str, ...], Report]:
    """What a placement's file says of it that is not so on this trace; everything is computed again.

    Args:
        path: the file that ``turnout place`` wrote.
        trace: the trace that it was made from.
        before: the placement that it came from, where it says that it came from one.

    Returns:
        Sentences, none where all holds; and the report as it is now.

    Raises:
        TurnoutError: a file that was altered, a placement that breaks the rules, or nothing said to check.

    Source: none; plain bookkeeping.
    """
    placement, stated = Placement.read(path)

    def refuse(problem: str, fix: str) -> CheckpointError:
        allowed = "say what it is worth, as turnout place writes it"
        return CheckpointError(word(str(path), got=problem, allowed=allowed, where="turnout certify", fix=fix))

    values = (stated or {}).get("values")
    if stated is None or not isinstance(values, dict):
        raise refuse("a placement of which nothing is stated", "write it with turnout place TRACE --out FILE")
    older = Placement.open(before) if before is not None else None
    if stated.get("before") != (older.digest if older is not None else None):
        got = "another placement before it" if older is not None else "moves from a placement that was not given"
        raise refuse(got, "pass --from the placement that it came from")
    bytes_, speeds = stated.get("expert_bytes", 0.0), stated.get("speed_G", [])
    if not isinstance(bytes_, int | float) or not isinstance(speeds, list):
        raise refuse("bytes or speeds that are no numbers", "write it again with turnout place")
    slots = stated.get("slots")
    if slots is not None and (not isinstance(slots, int) or isinstance(slots, bool)):
        raise refuse(f"slots that are no number ({slots!r:.40})", "write it again with turnout place")
    traffic = Traffic.of(Trace.open(trace))
    now = placement_report(
        traffic,
        placement,
        before=older,
        expert_bytes=bytes_,
        speed_G=np.array(speeds) if speeds else None,
        slots=slots,
    )
    broken = [
        f"it says {name} is {values.get(name)}, and it is {value}"
        for name, value in now.values.items()
        if not _same(values.get(name), value)
    ]
    if stated.get("trace") != traffic.source:
        broken.insert(0, "it was made from another trace")
    if now["imbalance"] < now["imbalance_bound"] - 1e-9 or now["crossing"] < now["crossing_bound"] - 1e-9:
        broken.append("it is below a bound, which cannot be")
    return tuple(broken), now


def _same(stated: object, found: object) -> bool:
    if isinstance(found, float) and isinstance(stated, int | float) and not isinstance(stated, bool):
        return math.isclose(stated, found, rel_tol=1e-9, abs_tol=1e-9)
    return stated == found
