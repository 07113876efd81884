"""Tutel: experts and their two all-to-alls in r chunks, attention and reductions outside."""

from turnout.decide.device.block_orders import DEGREES, Found, Shape, graph
from turnout.decide.device.unoverlapped import reduced_last
from turnout.types import BlockCosts

__all__ = ["tutel"]


def tutel(costs: BlockCosts, blocks: int) -> Found:
    """The best degree r: dispatch of chunk i + 1 under the experts of chunk i, and these under the combine of i - 1.

    Source: Hwang et al., 2023, "Tutel": adaptive pipelining, its degree found by trying. The same order is used by
        PipeMoE (Shi et al., 2023) with a degree from a model.
    """
    shapes = [Shape(expert_chunks=degree) for degree in DEGREES if degree <= costs.most_chunks]
    found = [reduced_last(graph(costs, blocks, shape), shape) for shape in shapes]
    return min(found, key=lambda one: one.seconds)
