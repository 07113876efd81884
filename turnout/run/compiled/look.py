"""Attention of one new position a row to what its cache holds, a ring where the layer has a window."""

import numpy as np

from turnout.run.compiled.curves import bounded, grown
from turnout.run.compiled.engine import kernel
from turnout.run.compiled.lanes import prange
from turnout.run.compiled.narrow import narrow
from turnout.run.compiled.tables import AT, BRAIN, FLOAT, OUTS, brains, floats, halves
from turnout.run.compiled.times import laid_out, times

__all__ = ["looked", "looked_all", "stored"]


@kernel()
def stored(code, address, new_W):
    """Writes these numbers into a cache of this kind."""
    W = new_W.shape[0]
    if code == FLOAT:
        room_W = floats(address, W)
        for w in range(W):
            room_W[w] = new_W[w]
    elif code == BRAIN:
        brain_W = brains(address, W)
        for w in range(W):
            brain_W[w] = narrow(new_W[w], brain_W[w])
    else:
        half_W = halves(address, W)
        for w in range(W):
            half_W[w] = narrow(new_W[w], half_W[w])


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
def looked(table, keys, values, item, q_GW, sinks_G, softcap, scale, score_GT, out_GV):
    """What G heads that share keys and values make of the first T slots of a cache: their weighted sum of values.

    Keys and values are stacks that the table describes, by output and by input; q is laid out as the keys take it.
    """
    G, T = score_GT.shape
    times(table, keys, item, q_GW, score_GT, 0, T)
    for g in range(G):
        sink = sinks_G[g] if sinks_G.shape[0] else np.float32(-np.inf)
        softened(score_GT[g], sink, softcap, scale)
    times(table, values, item, score_GT, out_GV, 0, out_GV.shape[1])


@kernel(threaded=True)
def _kept(table, layer, place_B, cache_B, qkv_BO, parts):
    """The new keys and values of every row go into its cache."""
    heads, key_heads, width, code = layer.heads, layer.key_heads, layer.head_width, layer.cache_code
    keys, values, window = layer.keys, layer.values, layer.window
    slots, size = table[keys, OUTS], 4 if code == FLOAT else 2
    for part in prange(parts):
        for item in range(part, place_B.shape[0] * key_heads, parts):
            b, g = item // key_heads, item % key_heads
            slot = place_B[b] % window if window > 0 else place_B[b]
            k = (heads + g) * width
            v, new = k + key_heads * width, ((cache_B[b] * key_heads + g) * slots + slot) * width * size
            stored(code, table[keys, AT] + new, qkv_BO[b, k : k + width])
            stored(code, table[values, AT] + new, qkv_BO[b, v : v + width])


@kernel(threaded=True)
def looked_all(table, layer, place_B, cache_B, qkv_BO, score_F, out_BQ, parts):
    """Attention of every row: its new keys and values go into its cache, then its heads look; a thread takes some.

    A row of ``qkv`` is its queries, keys and values, head after head. Rows may be of one text: each looks no farther
    than its own place. Each part has room for its own queries and scores.
    """
    _kept(table, layer, place_B, cache_B, qkv_BO, parts)
    # Threads are handed numbers and arrays, not the record that these come from.
    heads, key_heads, width = layer.heads, layer.key_heads, layer.head_width
    keys, values, window, sinks = layer.keys, layer.values, layer.window, layer.sinks
    softcap, scale = layer.softcap, layer.scale
    B, share = place_B.shape[0], heads // key_heads
    sinks_H = floats(sinks, heads if sinks != 0 else 0)
    room = score_F.shape[0] // parts
    for part in prange(parts):
        room_F = score_F[part * room : (part + 1) * room]
        for item in range(part, B * key_heads, parts):
            b, g = item // key_heads, item % key_heads
            seen = min(place_B[b] + 1, window) if window > 0 else place_B[b] + 1
            q = g * share * width
            q_GW = laid_out(table, keys, qkv_BO[b, q : q + share * width].reshape(share, width), room_F)
            out_GW = out_BQ[b, q : q + share * width].reshape(share, width)
            sinks_G = sinks_H[g * share : (g + 1) * share] if sinks != 0 else sinks_H
            score_GT = room_F[q_GW.size : q_GW.size + share * seen].reshape(share, seen)
            held = cache_B[b] * key_heads + g
            looked(table, keys, values, held, q_GW, sinks_G, softcap, scale, score_GT, out_GW)
