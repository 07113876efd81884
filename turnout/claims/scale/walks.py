"""Tokens that walk from expert to expert: traffic with a known affinity, for the claims about placements."""

import numpy as np

from turnout.types import Traffic

__all__ = ["walks"]


def walks(layers: int, experts: int, seed: int, *, alpha: float, tokens: int = 20_000) -> Traffic:
    """Each expert sends its tokens on by a distribution of its own.

    Args:
        layers: L.
        experts: E of each layer.
        seed: of the distributions and the tokens.
        alpha: of the Dirichlet that they are drawn from; the smaller, the fewer experts an expert sends to.
        tokens: T.

    Returns:
        The traffic.

    >>> walks(2, 4, 0, alpha=0.1, tokens=100).steps
    100.0

    Source: none; a Markov chain.
    """
    rng = np.random.default_rng(seed)
    load_LE, step_LEE = [rng.multinomial(tokens, rng.dirichlet(np.full(experts, 5.0)))], []
    for _ in range(layers - 1):
        rows = rng.dirichlet(np.full(experts, alpha), experts)
        step_LEE.append(np.stack([rng.multinomial(n, row) for n, row in zip(load_LE[-1], rows, strict=True)]) * 1.0)
        load_LE.append(step_LEE[-1].sum(0).astype(np.int64))
    return Traffic(tuple(load_LE), tuple(step_LEE), num_tokens=tokens)
