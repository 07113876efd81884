"""What the tasks of a sparse block take on a cluster, by arithmetic: for a schedule made before anything ran."""

from turnout.decide.device.pace import wire
from turnout.types import BlockCosts, BlockSize, Cluster, Layout, Line, Workload

__all__ = ["overlap_costs"]


def overlap_costs(
    workload: Workload, cluster: Cluster, layout: Layout, *, dense_bytes: int, expert_bytes: int
) -> BlockCosts:
    """The costs of a block, all of which are alike, where the experts are spread and nothing else is sharded.

    A device computes flops / rate, and starts attention and experts in half of ``cluster.block_s`` each; the gradient
    of inputs takes what the forward pass does, and so does that of weights. Rows go evenly to all experts. Both sums of
    gradients are reckoned on the slower of their wires, of all devices and of those that hold the same experts.

    Args:
        workload: the network and its step; of the blocks, the first one counts.
        cluster: the devices.
        layout: of one pipeline stage, with ep > 1.
        dense_bytes: of a block's gradient, its experts aside.
        expert_bytes: of the gradient of one device's experts.

    >>> block = BlockSize(1000, 2000.0, 10.0, experts=4, top_k=2, expert_params=500)
    >>> network = Workload((block,), width=8, seq=16, batch=8)
    >>> cluster, layout = Cluster(devices_per_node=2, flops_per_s=1e6), Layout(dp_shard=2, ep=2, zero=0)
    >>> costs = overlap_costs(network, cluster, layout, dense_bytes=4000, expert_bytes=4000)
    >>> costs.rows, costs.most_chunks, costs.expert_bytes, round(costs.experts(costs.rows), 3)
    (64, 4, 0, 0.128)

    Source: Pan et al., 2025, "FSMoE": t = alpha + beta n, there profiled, here from the cluster's numbers.
    """
    block, rate, start = workload.blocks[0], cluster.flops_per_s, cluster.block_s / 2
    rows = workload.tokens // layout.data_ranks
    gate = Line(0.0, 2.0 * workload.width * block.experts / rate)
    attention = Line(start, _attention_flops(block, workload) / rate)
    experts = Line(start, 2.0 * block.top_k * block.expert_params / rate)
    both = wire(cluster, layout.ep, 1)
    sent = rows * block.top_k * workload.travelling
    dispatch = Line(both.exchange(0.0), (both.exchange(sent) - both.exchange(0.0)) / rows)
    copies = layout.dp_replicate * layout.efsdp
    wires = [wire(cluster, layout.data_ranks, 1), wire(cluster, copies, layout.ep)]
    # An all-reduce is a reduce-scatter and an all-gather.
    reduce = max((Line(2 * w.gather(0.0), 2 * (w.gather(1e9) - w.gather(0.0)) / 1e9) for w in wires), key=_slowness)
    return BlockCosts(
        rows=rows,
        attention=attention,
        gate=gate,
        dispatch=dispatch,
        experts=experts,
        combine=dispatch,
        attention_input=attention,
        attention_weight=attention,
        attention_back=_twice(attention),
        gate_back=gate,
        experts_input=experts,
        experts_weight=experts,
        experts_back=_twice(experts),
        reduce=reduce,
        dense_bytes=dense_bytes if layout.data_ranks > 1 else 0,
        expert_bytes=expert_bytes if copies > 1 else 0,
        most_chunks=max(1, workload.batch // layout.data_ranks),
        sums=False,  # balance losses, and routers that learn from the load, want all rows' routings before the turn
    )


def _attention_flops(block: BlockSize, workload: Workload) -> float:
    """Of a token, without the gate's."""
    return max(0.0, block.flops - 2.0 * workload.width * block.experts)


def _twice(line: Line) -> Line:
    return Line(2 * line.start_s, 2 * line.each_s)


def _slowness(line: Line) -> float:
    return line(1e6)
