"""No overlap: each task after the other, gradients reduced when all of them are there."""

from turnout.decide.device.block_orders import Found, Graph, Shape, graph
from turnout.solve.list_schedule import list_schedule
from turnout.types import BlockCosts

__all__ = ["reduced_last", "unoverlapped"]


def unoverlapped(costs: BlockCosts, blocks: int) -> Found:
    """One chunk, and reductions behind everything: chip and wire take turns.

    Source: Rajbhandari et al., 2022, "DeepSpeed-MoE": what expert parallelism does without a schedule.
    """
    return reduced_last(graph(costs, blocks, Shape()), Shape())


def reduced_last(made: Graph, shape: Shape) -> Found:
    """The program's order with every reduction behind all that the wire does.

    Source: none; plain bookkeeping.
    """
    reduces = [task.kind in ("Ra", "Re") for task in made.tasks]
    # Without length they are in nobody's way, wherever list scheduling puts them.
    seconds = [0.0 if reduce else one for reduce, one in zip(reduces, made.seconds, strict=True)]
    orders = list_schedule(made.resource, seconds, made.needs, made.rank("program"), made.behind)
    wire = [task for task in orders[1] if not reduces[task]] + [task for task in orders[1] if reduces[task]]
    orders = [orders[0], wire, *orders[2:]]
    return Found(made.makespan(orders), shape, orders, made)
