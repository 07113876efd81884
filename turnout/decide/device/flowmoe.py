"""FlowMoE: attention, gate, dispatch, experts and combine of each chunk in one pipeline, reductions in between."""

from turnout.decide.device.block_orders import DEGREES, PIECES, Found, Shape, best
from turnout.types import BlockCosts

__all__ = ["flowmoe"]


def flowmoe(costs: BlockCosts, blocks: int) -> Found:
    """The best degree and the best size of pieces S_p; an all-to-all always goes before a reduction.

    Source: Gao et al., 2025, "FlowMoE". It finds S_p by Bayesian optimisation over measured steps; here by trying all.
    """
    degrees = [degree for degree in DEGREES if degree <= costs.most_chunks]
    return best(costs, blocks, (Shape(degree, degree, count) for degree in degrees for count in PIECES))
