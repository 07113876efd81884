"""FSMoE: the experts' pipeline with wires inside and between nodes apart, and gradients cut to fill its gaps."""

from turnout.decide.device.block_orders import DEGREES, PIECES, Found, Shape, best
from turnout.decide.device.tutel import tutel
from turnout.types import BlockCosts

__all__ = ["fsmoe"]


def fsmoe(costs: BlockCosts, blocks: int) -> Found:
    """The best degree and the best size of pieces together, reductions wherever the wire between nodes is free.

    Source: Pan et al., 2025, "FSMoE". It solves for degree and sizes in closed form by cases and lets the degrees of
        forward and backward pass differ; here both are found by trying all, with one degree for both.
    """
    shapes = [Shape(1, degree, count) for degree in DEGREES if degree <= costs.most_chunks for count in PIECES]
    # A piece in a gap that is too small for it delays an all-to-all: where that is worse, it fills none.
    return min(best(costs, blocks, shapes), tutel(costs, blocks), key=lambda one: one.seconds)
