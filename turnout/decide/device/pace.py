"""How long a step of a plan takes on a cluster, and what is waited for."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from turnout.decide.device.memory import Share, chunks, shares
from turnout.types import Cluster, Layout, Plan, Workload

__all__ = ["Pace", "Wire", "pace"]


@dataclasses.dataclass(frozen=True)
class Wire:
    """What joins a group of devices.

    Args:
        size: n, how many they are.
        local: g, how many of them are in one node.
        cluster: theirs.

    >>> wire = Wire(4, 2, Cluster(nodes=2, devices_per_node=2, intra_bytes_per_s=100.0, inter_bytes_per_s=10.0))
    >>> wire.crosses, round(wire.gather(400.0), 1)
    (True, 15.0)

    Source: Hockney, 1994; rings over all of a node's wires, as NCCL runs them.
    """

    size: int
    local: int
    cluster: Cluster

    @property
    def crosses(self) -> bool:
        """Whether it leaves a node."""
        return self.local < self.size

    @property
    def _latency_s(self) -> float:
        return self.cluster.inter_latency_s if self.crosses else self.cluster.intra_latency_s

    def gather(self, total_bytes: float, parts: int = 1) -> float:
        """Seconds of an all-gather or a reduce-scatter of so many bytes: (n - 1) / n of them pass each device.

        In ``parts`` of them each waits for its own messages.
        """
        if self.size == 1:
            return 0.0
        rate = self.cluster.intra_bytes_per_s
        if self.crosses:
            rate = min(rate, self.local * self.cluster.inter_bytes_per_s)
        return (self.size - 1) / self.size * total_bytes / rate + parts * (self.size - 1) * self._latency_s

    def exchange(self, bytes_each: float) -> float:
        """Seconds of an all-to-all where each device has so many bytes for all, its own part included."""
        n, g = self.size, self.local
        if n == 1:
            return 0.0
        inside = bytes_each * (g - 1) / n / self.cluster.intra_bytes_per_s + (g - 1) * self.cluster.intra_latency_s
        outside = bytes_each * (n - g) / n / self.cluster.inter_bytes_per_s + (n - g) * self.cluster.inter_latency_s
        return max(inside, outside if self.crosses else 0.0)

    def send(self, size_bytes: float) -> float:
        """Seconds of one message."""
        rate = self.cluster.inter_bytes_per_s if self.crosses else self.cluster.intra_bytes_per_s
        return size_bytes / rate + self._latency_s


def wire(cluster: Cluster, size: int, stride: int) -> Wire:
    """The wire of ``size`` devices whose numbers are ``stride`` apart."""
    inside = max(1, cluster.devices_per_node // stride)
    return Wire(size, min(size, inside), cluster)


@dataclasses.dataclass(frozen=True)
class Pace:
    """A step, in seconds of what is waited for, and what passes the wires of a device.

    Args:
        seconds: ``compute``, ``bubble``, and what is not hidden of ``experts' exchange``, ``gathering``, ``reducing``,
            ``stages``, ``tensor parallel``, ``sequence``, ``optimizer``.
        link_bytes: of one device and step, by the same names.
        crossing: the names whose messages leave a node.

    >>> Pace({"compute": 3.0, "bubble": 1.0}, {}, ()).step_s
    4.0

    Source: none; plain bookkeeping.
    """

    seconds: Mapping[str, float]
    link_bytes: Mapping[str, float]
    crossing: tuple[str, ...]

    @property
    def step_s(self) -> float:
        """All of it."""
        return sum(self.seconds.values())

    @property
    def bubble(self) -> float:
        """The share of the step in which a device waits for the pipeline."""
        return self.seconds.get("bubble", 0.0) / self.step_s

    @property
    def binds(self) -> str:
        """What costs most beside computing."""
        waits = {name: value for name, value in self.seconds.items() if name != "compute"}
        most = max(waits, key=lambda name: waits[name], default="compute")
        return "compute" if not waits or waits[most] < 0.1 * self.seconds["compute"] else most


def pace(workload: Workload, cluster: Cluster, plan: Plan, *, action_s: float = 0.0) -> Pace:
    """The step of a plan, by arithmetic.

    A device computes flops / rate; forward counts once, backward twice, and recomputing once more. Experts' exchanges
    are waited for whole, gathers and reductions, one of each block and its experts, where they take longer than what is
    computed meanwhile, as far as the cluster hides messages behind computing; with zero=2 and 3 every micro-batch has
    its own, but in a pipeline, which gathers and reduces once a step. The pipeline's bubble is
    (P - 1)(F + B) for GPipe and 1F1B, divided by the chunks where they are interleaved, a third of it where weight
    gradients fill it (ZB-H1), and none for ZBV.

    Args:
        workload: the network and its step.
        cluster: the devices.
        plan: how they share the work.
        action_s: what each of a device's tasks takes on top.

    >>> from turnout.types import BlockSize
    >>> network = Workload((BlockSize(10, 20.0, 1.0),) * 2, width=4, seq=8, batch=4)
    >>> alone = pace(network, Cluster(flops_per_s=1e3), Plan())
    >>> round(alone.seconds["compute"], 2)
    3.84

    Source: Narayanan et al., 2021, "Efficient Large-Scale Language Model Training on GPU Clusters"; Qi et al., 2024,
    "Zero Bubble Pipeline Parallelism".
    """
    return pace_of(shares(workload, plan), workload, cluster, plan, action_s)


def pace_of(owned: Sequence[Share], workload: Workload, cluster: Cluster, plan: Plan, action_s: float = 0.0) -> Pace:
    """As ``pace``, of shares that are known."""
    layout = plan.layout
    tokens = workload.tokens / (layout.data_ranks * layout.cp * plan.microbatches)
    parts = [_device(workload, cluster, plan, part, tokens, device) for device, part in enumerate(owned)]
    m = plan.microbatches
    one = max(sum(part.waits.values()) for part in parts)
    slowest = max(parts, key=lambda part: m * sum(part.waits.values()) + sum(part.once.values()))
    seconds = {name: m * value for name, value in slowest.waits.items()}
    seconds["compute"] += action_s * 2 * m * (layout.pp > 1) * chunks(plan.schedule)
    if layout.pp > 1:
        share = {"Interleaved1F1B": 1 / chunks(plan.schedule), "ZBVZeroBubble": 0.0, "ZB-H1": 1 / 3, "DualPipeV": 0.25}
        send = wire(cluster, 2, layout.world // layout.pp).send(tokens * workload.travelling)
        seconds["bubble"] = (layout.pp - 1) * one * share.get(plan.schedule, 1.0)
        seconds["stages"] = 2 * (layout.pp - 1) * send * chunks(plan.schedule)
    sent = {name: m * value for name, value in slowest.sent.items()}
    for added, of_step in ((seconds, slowest.once), (sent, slowest.sent_once)):
        added |= {name: added.get(name, 0.0) + value for name, value in of_step.items()}
    return Pace(seconds, sent, slowest.crossing)


@dataclasses.dataclass(frozen=True)
class _Device:
    """Of one device: seconds and bytes of a micro-batch by name, and those of a step."""

    waits: dict[str, float]
    once: dict[str, float]
    sent: dict[str, float]
    sent_once: dict[str, float]
    crossing: tuple[str, ...]


def _device(workload: Workload, cluster: Cluster, plan: Plan, part: Share, tokens: float, device: int) -> _Device:
    layout, rate = plan.layout, cluster.flops_per_s
    ends = workload.first_flops * part.first + workload.vocab * workload.width * 2 * part.last
    flops = (part.flops + ends) / layout.tp + part.expert_flops
    compute = (4 if plan.recompute else 3) * (tokens * flops / rate + part.blocks * cluster.block_s)
    waits, sent = {"compute": compute}, {}
    wires = {
        "experts' exchange": wire(cluster, layout.ep, 1),
        "tensor parallel": wire(cluster, layout.tp, 1),
        "sequence": wire(cluster, layout.cp, layout.tp),
        "gathering": wire(cluster, layout.dp_shard * layout.cp, layout.tp),
        "reducing": wire(cluster, layout.data_ranks * layout.cp, layout.tp),
        "stages": wire(cluster, layout.pp, layout.world // layout.pp),
    }
    if layout.ep > 1:
        trips, each = 6 if plan.recompute else 4, tokens * part.routed * workload.travelling
        routed = part.routed_blocks
        one = wires["experts' exchange"].exchange(each / max(1, routed))
        waits["experts' exchange"] = trips * routed * one
        sent["experts' exchange"] = trips * each * (layout.ep - 1) / layout.ep
    activation = tokens * workload.travelling
    if layout.pp > 1:
        sent["stages"] = activation * messages(plan, device)
    if layout.tp > 1:
        waits["tensor parallel"] = part.blocks * 8 * wires["tensor parallel"].gather(activation)
        sent["tensor parallel"] = part.blocks * 8 * activation * (layout.tp - 1) / layout.tp
    if layout.cp > 1:
        ring = 3 * 2 * wires["sequence"].gather(activation * layout.cp)
        waits["sequence"] = part.blocks * (ring - min(ring, compute / max(1, part.blocks)) * cluster.hides)
        sent["sequence"] = part.blocks * 6 * activation * (layout.cp - 1)
    once, sent_once = _state(workload, cluster, plan, part, waits, sent, wires, compute)
    crossing = tuple(name for name in {**sent, **sent_once} if name in wires and wires[name].crosses)
    return _Device(waits, once, sent, sent_once, crossing)


def _state(
    workload: Workload,
    cluster: Cluster,
    plan: Plan,
    part: Share,
    waits: dict[str, float],
    sent: dict[str, float],
    wires: Mapping[str, Wire],
    compute: float,
) -> tuple[dict[str, float], dict[str, float]]:
    """What parameters, gradients and the optimizer add: of a micro-batch into ``waits``, of a step as the result."""
    layout = plan.layout
    dense, experts = (part.params + part.ends) / layout.tp, part.experts / layout.ep
    again, shards = part.params / layout.tp, wires["gathering"].size if layout.zero else 1
    # What there is to gather: all, and between a micro-batch's forward and backward pass the blocks once more.
    inner = layout.efsdp if layout.zero else 1
    near, enear = _kept_by(plan, shards), _kept_by(plan, inner)
    size = {"full": workload.param_bytes, "bf16": 2.0, "int8": 1.0 + 4 / 256}[plan.gather]
    down = {"full": workload.grad_bytes, "bf16": 2.0, "int4": 0.5 + 4 / 128}[plan.reduce]
    often = layout.zero >= 2 and layout.pp == 1  # else once a step
    once, sent_once = dict[str, float](), dict[str, float]()
    units, routed = part.blocks + 1, part.routed_blocks  # each travels by itself; the last has embedding and head
    where, also = (waits, sent) if often else (once, sent_once)
    if layout.zero and layout.folded > 1:
        twice = often and layout.zero == 3
        flows = [(dense, shards, layout.tp, units), (experts, inner, layout.ep, routed)]
        flows += [(again, near, layout.tp, part.blocks), (experts, enear, layout.ep, routed)] if twice else []
        each = sum(wire(cluster, n, stride).gather(count * size, times) for count, n, stride, times in flows)
        where["gathering"] = each - min(each, (1.0 if twice else 1 / 3) * compute) * cluster.hides
        also["gathering"] = size * sum(count * (1 - 1 / n) for count, n, *_ in flows)
    if (ranks := wires["reducing"].size) > 1:
        # A reduce-scatter over the shards, then an all-reduce of what is left over their copies.
        wide = 2.0 if plan.reduce == "bf16" else workload.grad_bytes
        each = total = 0.0
        for count, n, stride, all_ranks, times in (
            (dense, shards, layout.tp, ranks, units),
            (experts, inner, layout.ep, layout.efsdp * layout.dp_replicate, routed),
        ):
            copies = wire(cluster, all_ranks // n, stride * n)
            each += wire(cluster, n, stride).gather(count * down, times)
            each += 2 * copies.gather(count / n * wide, times)
            total += count * down * (1 - 1 / n) + 2 * count / n * wide * (1 - 1 / copies.size)
        where["reducing"], also["reducing"] = each - min(each, 2 / 3 * compute) * cluster.hides, total
    if part.copied:  # both ends add up its gradients
        size = part.copied * workload.grad_bytes / layout.tp / shards
        sent_once["stages"] = size
        once["stages"] = wire(cluster, 2, layout.world // layout.pp).send(size)
    split = layout.zero >= 1
    touched = dense / (layout.dp_shard * layout.cp if split else 1) + experts / (layout.efsdp if split else 1)
    each = workload.param_bytes + workload.grad_bytes + 2 * workload.optimizer_bytes
    once["optimizer"] = touched * each / cluster.memory_bytes_per_s
    return once, sent_once


def _kept_by(plan: Plan, shards: int) -> int:
    """Over how many devices parameters are gathered for the backward pass."""
    return shards if plan.secondary is None else min(plan.secondary, shards)


def messages(plan: Plan, device: int) -> int:
    """How many times a device of a pipeline sends a micro-batch to another, forward and backward.

    >>> [messages(Plan(Layout(pp=3)), device) for device in range(3)]
    [1, 2, 1]
    """
    pp = plan.layout.pp
    count = pp * chunks(plan.schedule)
    turns = plan.schedule in ("ZBVZeroBubble", "DualPipeV")
    holder = [2 * pp - 1 - stage if turns and stage >= pp else stage % pp for stage in range(count)]
    pairs = [(one, other) for one, other in itertools.pairwise(holder) if one != other]
    return sum((device == one) + (device == other) for one, other in pairs)


def degrees(layout: Layout) -> str:
    """The layout as the command line takes it.

    >>> degrees(Layout(dp_shard=4, ep=2))
    'dp_shard=4,ep=2,zero=3'
    """
    found = [f"{f.name}={getattr(layout, f.name)}" for f in dataclasses.fields(layout) if f.name != "zero"]
    found = [text for text in found if not text.endswith("=1")]
    return ",".join([*found, f"zero={layout.zero}"] if layout.dp_shard > 1 else found)
