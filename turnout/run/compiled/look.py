"""Attention of one new position a row to what the pages of its text hold, or to the last of them that a window shows.

A page is ``PAGE`` positions of a text; which of a layer's pages they are, a table says. Pages that lie after each other
are met as one.

Source: Kwon et al., 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention".
"""

import numpy as np

from turnout.run.compiled.curves import bounded, grown
from turnout.run.compiled.engine import kernel
from turnout.run.compiled.lanes import prange
from turnout.run.compiled.narrow import narrow
from turnout.run.compiled.tables import AT, BRAIN, FLOAT, PAGE, begins, brains, floats, halves
from turnout.run.compiled.times import laid_out, met

__all__ = ["looked", "looked_all", "softened", "stored"]


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
def stretch(page_P, at, end):
    """Where the positions from ``at`` lie that lie after each other, and where they end, at ``end`` at the latest.

    What begins within a page ends with it: so sums are the same wherever pages are.
    """
    page = at // PAGE
    last = (page + 1) * PAGE
    if at % PAGE == 0:
        while last < end and page_P[page + 1] == page_P[page] + 1:
            page, last = page + 1, last + PAGE
    return page_P[at // PAGE] * PAGE + at % PAGE, min(last, end)


@kernel()
def looked(table, keys, values, start, page_P, first, end, q_GW, sinks_G, softcap, scale, score_GT, out_GV):
    """What G heads that share keys and values make of a text's positions: their weighted sum of values.

    Keys and values are stacks that the table describes, by output and by input, and of which every position begins
    another matrix; those of these heads begin at ``start``. q is laid out as the keys take it.
    """
    G, T, V = score_GT.shape[0], score_GT.shape[1], out_GV.shape[1]
    q, score, out = begins(q_GW), begins(score_GT), begins(out_GV)
    size, between, at = q_GW.strides[0] // 4, out_GV.strides[0] // 4, first
    while at < end:
        slot, last = stretch(page_P, at, end)
        met(table, keys, start + slot, q_GW.shape[1], q, size, G, score + 4 * (at - first), T, 0, last - at)
        at = last
    for g in range(G):
        sink = sinks_G[g] if sinks_G.shape[0] else np.float32(-np.inf)
        softened(score_GT[g], sink, softcap, scale)
        for v in range(V):
            out_GV[g, v] = np.float32(0)
    at = first
    while at < end:
        slot, last = stretch(page_P, at, end)
        met(table, values, start + slot, last - at, score + 4 * (at - first), T, G, out, between, 0, V)
        at = last


@kernel(threaded=True)
def _kept(table, layer, place_B, page_BP, qkv_BO, parts):
    """The new keys and values of every row go into its pages."""
    heads, key_heads, width, code = layer.heads, layer.key_heads, layer.head_width, layer.cache_code
    keys, values, slots, size = layer.keys, layer.values, layer.slots, 4 if layer.cache_code == FLOAT else 2
    for part in prange(parts):
        for item in range(part, place_B.shape[0] * key_heads, parts):
            b, g = item // key_heads, item % key_heads
            slot = page_BP[b, place_B[b] // PAGE] * PAGE + place_B[b] % PAGE
            k = (heads + g) * width
            v, new = k + key_heads * width, (g * slots + slot) * width * size
            stored(code, table[keys, AT] + new, qkv_BO[b, k : k + width])
            stored(code, table[values, AT] + new, qkv_BO[b, v : v + width])


@kernel(threaded=True)
def looked_all(table, layer, place_B, page_BP, qkv_BO, score_F, out_BQ, parts):
    """Attention of every row: its new keys and values go into its pages, then its heads look; a thread takes some.

    A row of ``qkv`` is its queries, keys and values, head after head. Rows may be of one text: each looks no farther
    than its own place. Each part has room for its own queries and scores.
    """
    _kept(table, layer, place_B, page_BP, qkv_BO, parts)
    # Threads are handed numbers and arrays, not the record that these come from.
    heads, key_heads, width, slots = layer.heads, layer.key_heads, layer.head_width, layer.slots
    keys, values, window, sinks = layer.keys, layer.values, layer.window, layer.sinks
    softcap, scale = layer.softcap, layer.scale
    B, share = place_B.shape[0], heads // key_heads
    sinks_H = floats(sinks, heads if sinks != 0 else 0)
    room = score_F.shape[0] // parts
    for part in prange(parts):
        room_F = score_F[part * room : (part + 1) * room]
        for item in range(part, B * key_heads, parts):
            b, g = item // key_heads, item % key_heads
            end = place_B[b] + 1
            first = max(0, end - window) if window > 0 else 0
            q = g * share * width
            q_GW = laid_out(table, keys, qkv_BO[b, q : q + share * width].reshape(share, width), room_F)
            out_GW = out_BQ[b, q : q + share * width].reshape(share, width)
            sinks_G = sinks_H[g * share : (g + 1) * share] if sinks != 0 else sinks_H
            score_GT = room_F[q_GW.size : q_GW.size + share * (end - first)].reshape(share, end - first)
            page_P, start = page_BP[b], g * slots
            looked(table, keys, values, start, page_P, first, end, q_GW, sinks_G, softcap, scale, score_GT, out_GW)
