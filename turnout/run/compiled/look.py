"""Attention of one new position a row to what its cache holds, a ring where the layer has a window."""

import numpy as np

from turnout.run.compiled.curves import bounded, grown
from turnout.run.compiled.engine import kernel
from turnout.run.compiled.lanes import prange
from turnout.run.compiled.tables import FLOAT, brains, floats
from turnout.run.compiled.times import across, along

__all__ = ["looked", "looked_all", "rounded", "stored"]


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
def softened(score_T, sink, softcap, scale):
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
    V = out_GV.shape[1]
    if code == FLOAT:
        along(q_GW, floats(keys, slots_T * W), W, score_GT, 0, slots_T)
    else:
        along(q_GW, brains(keys, slots_T * W), W, score_GT, 0, slots_T)
    for g in range(G):
        sink = sinks_G[g] if sinks_G.shape[0] else np.float32(-np.inf)
        softened(score_GT[g], sink, softcap, scale)
    if code == FLOAT:
        across(score_GT, floats(values, slots_T * V), V, out_GV, 0, V)
    else:
        across(score_GT, brains(values, slots_T * V), V, out_GV, 0, V)


@kernel(threaded=True)
def looked_all(
    code,
    keys,
    values,
    slots,
    window,
    place_B,
    qkv_BO,
    heads,
    key_heads,
    width,
    sinks,
    softcap,
    scale,
    score_F,
    out_BQ,
    parts,
):
    """Attention of every row: its new keys and values go into the cache, then its heads look; a thread takes some.

    A row of ``qkv`` is its queries, keys and values, head after head. Each part has room for its own scores.
    """
    B, share, size = place_B.shape[0], heads // key_heads, 4 if code == FLOAT else 2
    sinks_H = floats(sinks, heads if sinks != 0 else 0)
    room = score_F.shape[0] // parts
    for part in prange(parts):
        for item in range(part, B * key_heads, parts):
            b, g = item // key_heads, item % key_heads
            row_O, slot, seen = qkv_BO[b], place_B[b], place_B[b] + 1
            if window > 0:
                slot, seen = slot % window, min(seen, window)
            at, k, q = item * slots * width * size, (heads + g) * width, g * share * width
            v, new = k + key_heads * width, at + slot * width * size
            stored(code, keys + new, row_O[k : k + width])
            stored(code, values + new, row_O[v : v + width])
            q_GW = row_O[q : q + share * width].reshape(share, width)
            out_GW = out_BQ[b, q : q + share * width].reshape(share, width)
            sinks_G = sinks_H[g * share : (g + 1) * share] if sinks != 0 else sinks_H
            score_GT = score_F[part * room : part * room + share * seen].reshape(share, seen)
            looked(code, keys + at, values + at, seen, q_GW, sinks_G, softcap, scale, score_GT, out_GW)
