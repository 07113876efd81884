"""Attention of one new position a row to what its cache holds, a ring where the layer has a window."""

import numpy as np

from turnout.run.compiled.curves import bounded, grown
from turnout.run.compiled.engine import kernel
from turnout.run.compiled.tables import FLOAT, brains, floats
from turnout.run.compiled.times import across, along

__all__ = ["looked", "rounded", "stored"]


@kernel()
def rounded(x):
    """The bits of the bfloat16 nearest to x, of two equally near ones the even; NaN stays NaN."""
    bits = np.float32(x).view(np.uint32)
    if x != x:
        return np.uint16((bits >> np.uint32(16)) | np.uint32(64))
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@kernel()
def stored(code, address, new_W):
    """Writes these numbers into a cache of this kind."""
    W = new_W.shape[0]
    if code == FLOAT:
        room_W = floats(address, W)
        for w in range(W):
            room_W[w] = new_W[w]
    else:
        bits_W = brains(address, W)
        for w in range(W):
            bits_W[w] = rounded(new_W[w])


@kernel()
def shared(score_T, sink, softcap, scale):
    """The softmax of these scores in place, with one more term e^sink that no position belongs to."""
    most = sink
    for t in range(score_T.shape[0]):
        score = score_T[t] * scale
        if softcap > np.float32(0):
            score = softcap * bounded(score / softcap)
        score_T[t] = score
        most = max(most, score)
    total = grown(sink - most)
    for t in range(score_T.shape[0]):
        score_T[t] = grown(score_T[t] - most)
        total += score_T[t]
    inverse = np.float32(1) / total
    for t in range(score_T.shape[0]):
        score_T[t] *= inverse


@kernel()
def looked(code, keys, values, slots_T, q_GW, sinks_G, softcap, scale, score_GT, out_GV):
    """What G heads that share keys and values make of the first T slots of a cache: their weighted sum of values."""
    G, W = q_GW.shape
    V, none_0 = out_GV.shape[1], q_GW[0, :0]
    if code == FLOAT:
        along(q_GW, floats(keys, slots_T * W), W, none_0, score_GT)
    else:
        along(q_GW, brains(keys, slots_T * W), W, none_0, score_GT)
    for g in range(G):
        sink = sinks_G[g] if sinks_G.shape[0] else np.float32(-np.inf)
        shared(score_GT[g], sink, softcap, scale)
    if code == FLOAT:
        across(score_GT, floats(values, slots_T * V), V, none_0, out_GV)
    else:
        across(score_GT, brains(values, slots_T * V), V, none_0, out_GV)
