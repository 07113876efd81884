"""Planted traces: texts of a few topics, whose tokens keep to favourites and follow paths from layer to layer."""

import numpy as np

from turnout.types import Accesses

__all__ = ["planted_paths"]


def planted_paths(
    model: int,
    seed: int,
    *,
    texts: int = 24,
    tokens: int = 60,
    layers: int = 6,
    experts: int = 32,
    uses: int = 3,
    topics: int = 6,
    follows: float = 0.5,
) -> Accesses:
    """Accesses of texts read one after the other.

    A text has a topic, and likings of its own; what it likes in a layer is drawn anew for each token around them. With
    the chance ``follows`` an expert is instead the one that the model sends the tokens of the last layer's expert to.

    Args:
        model: the seed of topics and ways.
        seed: of the texts.
        texts: how many.
        tokens: of each.
        layers: L.
        experts: E.
        uses: K, of each token in a layer.
        topics: how many.
        follows: see above.
    """
    ways = np.random.default_rng(model)
    liked_ZLE = 2.0 * ways.standard_normal((topics, layers, experts))
    next_LE = np.stack([ways.permutation(experts) for _ in range(layers)])
    rng, rows = np.random.default_rng(seed), []
    for _ in range(texts):
        text_LE = liked_ZLE[rng.integers(topics)] + rng.standard_normal((layers, experts))
        for _ in range(tokens):
            score_LE = text_LE + rng.gumbel(size=(layers, experts))
            path = np.empty((layers, uses), np.int64)
            for layer in range(layers):
                own = np.argsort(-score_LE[layer], kind="stable")
                sent = next_LE[layer][path[layer - 1]] if layer else own[:0]
                taken = [int(e) for e in sent if rng.random() < follows]
                path[layer] = [*taken, *[int(e) for e in own if e not in taken]][:uses]
            rows.append(path)
    text_T = np.repeat(np.arange(texts), tokens)
    return Accesses.of_paths(np.stack(rows), experts=experts, document_T=text_T)
