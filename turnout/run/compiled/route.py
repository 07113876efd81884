"""The routers of the published architectures, for the rows of a step, by tables."""

import numpy as np

from turnout.run.compiled.curves import grown
from turnout.run.compiled.engine import kernel
from turnout.run.compiled.tables import floats

__all__ = ["chosen"]


@kernel()
def scored(logit_E, sigmoid):
    """The sigmoid or the softmax of these logits, in place."""
    E = logit_E.shape[0]
    if sigmoid != 0:
        for e in range(E):
            logit_E[e] = np.float32(1) / (np.float32(1) + grown(-logit_E[e]))
        return
    most, total = logit_E[0], np.float32(0)
    for e in range(E):
        most = max(most, logit_E[e])
    for e in range(E):
        logit_E[e] = grown(logit_E[e] - most)
        total += logit_E[e]
    for e in range(E):
        logit_E[e] /= total


@kernel()
def largest(score_E, taken_E):
    """The largest of those that are not taken, of equal ones the first; the first of all where none is a number."""
    best, found = -1, 0
    for e in range(score_E.shape[0]):
        if not taken_E[e] and (best < 0 or score_E[e] > score_E[best]):
            best = e
        if best < 0:
            found = e
    return best if best >= 0 else found


@kernel()
def limited(layer, biased_E, taken_E):
    """Takes away the experts of all groups but the best."""
    groups = layer.groups
    size, group_G, closed_G = biased_E.shape[0] // groups, np.empty(groups, np.float32), np.zeros(groups, np.bool_)
    for g in range(groups):
        first, second = np.float32(-np.inf), np.float32(-np.inf)
        for e in range(g * size, (g + 1) * size):
            if biased_E[e] > first:
                first, second = biased_E[e], first
            elif biased_E[e] > second:
                second = biased_E[e]
        group_G[g] = first + second if layer.best_two != 0 and size > 1 else first
    for _ in range(layer.top_groups):
        closed_G[largest(group_G, closed_G)] = True
    for e in range(biased_E.shape[0]):
        taken_E[e] = not closed_G[e // size]


@kernel()
def chosen(layer, logit_E, choice_K, weight_K, rank):
    """The experts that a row takes and their weights, from the logits, which become scores.

    With a rank above 0 it takes the one expert of that rank alone, 1 being the best; the other places are -1, no one.
    """
    E, K = logit_E.shape[0], choice_K.shape[0]
    scored(logit_E, layer.sigmoid)
    biased_E, taken_E = logit_E, np.zeros(E, np.bool_)
    if layer.correction != 0:
        bias_E, biased_E = floats(layer.correction, E), np.empty(E, np.float32)
        for e in range(E):
            biased_E[e] = logit_E[e] + bias_E[e]
    if layer.top_groups < layer.groups:
        limited(layer, biased_E, taken_E)
    total = layer.floor
    for _ in range(rank - 1):
        taken_E[largest(biased_E, taken_E)] = True
    for k in range(K):
        if rank > 0 and k > 0:
            choice_K[k], weight_K[k] = -1, np.float32(0)
            continue
        e = largest(biased_E, taken_E)
        taken_E[e] = True
        choice_K[k], weight_K[k] = e, logit_E[e]
        total += logit_E[e]
    for k in range(K):
        weight_K[k] *= layer.weight_scale / total if layer.renormalize != 0 else layer.weight_scale
