"""Multi-head latent attention of a step: heads look at the latents themselves, which are all that the cache holds.

What makes keys of latents is applied to the queries instead, and what makes values to what the heads have seen:
(q W_k) . c is q . (W_k c), and W_v (sum_t p_t c_t) is sum_t p_t (W_v c_t).

Source: DeepSeek-AI, 2024, "DeepSeek-V2", section 2.1.2 (the matrices are absorbed).
"""

import numpy as np

from turnout.run.compiled.engine import kernel
from turnout.run.compiled.lanes import prange
from turnout.run.compiled.look import looked, stored
from turnout.run.compiled.norms import neighbours_turned, normed, turned
from turnout.run.compiled.tables import AT, FLOAT, INS, OUTS, PAGE, STRIDE
from turnout.run.compiled.times import laid_out, spread, times

__all__ = ["latent_attention"]


@kernel()
def _turned_to(neighbours, head_R, cos_P, sin_P, out_R):
    """The rotated part of a head: the two numbers of a pair come out half a head apart."""
    if neighbours != 0:
        neighbours_turned(head_R, cos_P, sin_P, out_R)
    else:
        for r in range(out_R.shape[0]):
            out_R[r] = head_R[r]
        turned(out_R, cos_P, sin_P)


@kernel(threaded=True)
def _absorbed(table, which, heads, q_BO, query_BHW, parts):
    """Each head's query as one of latents."""
    width, ins, outs = q_BO.shape[1] // heads, table[which, INS], table[which, OUTS]
    for part in prange(parts):
        for h in range(part, heads, parts):
            times(table, which, h, q_BO[:, h * width : h * width + ins], query_BHW[:, h, :outs], 0, outs)


@kernel(threaded=True)
def _valued(table, which, seen_BHC, room_F, out_BO, parts):
    """Each head's value, of the latent that it has seen."""
    heads, outs, room = seen_BHC.shape[1], table[which, OUTS], room_F.shape[0] // parts
    for part in prange(parts):
        for h in range(part, heads, parts):
            wide_BC = laid_out(table, which, seen_BHC[:, h], room_F[part * room : (part + 1) * room])
            times(table, which, h, wide_BC, out_BO[:, h * outs : (h + 1) * outs], 0, outs)


@kernel(threaded=True)
def _looked_latents(table, layer, place_B, page_BP, new_BW, query_BHW, room_F, seen_BHC, parts):
    """The new latents go into the pages, then all heads of a row look at the same; a thread takes some heads."""
    keys, values, window, code = layer.keys, layer.values, layer.window, layer.cache_code
    softcap, scale, heads = layer.softcap, layer.scale, query_BHW.shape[1]
    stride, size = table[keys, STRIDE], 4 if code == FLOAT else 2
    for b in range(place_B.shape[0]):
        slot = page_BP[b, place_B[b] // PAGE] * PAGE + place_B[b] % PAGE
        stored(code, table[keys, AT] + slot * stride * size, new_BW[b])
    room, no_sinks = room_F.shape[0] // parts, np.zeros(0, np.float32)
    for part in prange(parts):
        own_F = room_F[part * room : (part + 1) * room]
        first, last = heads * part // parts, heads * (part + 1) // parts
        for b in range(place_B.shape[0]):
            end = place_B[b] + 1
            begin = max(0, end - window) if window > 0 else 0
            q_GW = laid_out(table, keys, query_BHW[b, first:last], own_F)
            seen = end - begin
            score_GT = own_F[q_GW.size : q_GW.size + (last - first) * seen].reshape(last - first, seen)
            out_GC, page_P = seen_BHC[b, first:last], page_BP[b]
            looked(table, keys, values, 0, page_P, begin, end, q_GW, no_sinks, softcap, scale, score_GT, out_GC)


@kernel()
def latent_attention(layer, norms, table, h_BD, place_B, page_BP, cos_BP, sin_BP, room_F, y_BD, parts):
    """What the latent attention of a layer makes of normed rows; their latents are added to the pages."""
    B, heads, C, R = h_BD.shape[0], layer.heads, layer.latent, layer.rotated
    fixed = table[layer.k_up, INS]
    q_size, wide, out = heads * (fixed + R), C + R, table[layer.out, INS]
    at_new = B * q_size
    at_query = at_new + B * wide
    at_seen = at_query + B * heads * wide
    at_mixed = at_seen + B * heads * C
    at_rest = at_mixed + B * out
    q_BO, new_BW = room_F[:at_new].reshape(B, q_size), room_F[at_new:at_query].reshape(B, wide)
    query_BHW = room_F[at_query:at_seen].reshape(B, heads, wide)
    seen_BHC = room_F[at_seen:at_mixed].reshape(B, heads, C)
    mixed_BO, rest_F = room_F[at_mixed:at_rest].reshape(B, out), room_F[at_rest:]
    if layer.q_down >= 0:
        rank = table[layer.q_down, OUTS]
        q_BR, free_F = rest_F[: B * rank].reshape(B, rank), rest_F[B * rank :]
        spread(table, layer.q_down, h_BD, free_F, q_BR, parts)
        for b in range(B):
            normed(norms[layer.q_norm], q_BR[b], q_BR[b])
        spread(table, layer.q_up, q_BR, free_F, q_BO, parts)
    else:
        spread(table, layer.q_up, h_BD, rest_F, q_BO, parts)
    spread(table, layer.kv_down, h_BD, rest_F, new_BW, parts)
    for b in range(B):
        normed(norms[layer.k_norm], new_BW[b, :C], new_BW[b, :C])
        key_R = rest_F[:R]
        _turned_to(layer.neighbours, new_BW[b, C:], cos_BP[b], sin_BP[b], key_R)
        for r in range(R):
            new_BW[b, C + r] = key_R[r]
        for h in range(heads):
            start = h * (fixed + R) + fixed
            _turned_to(layer.neighbours, q_BO[b, start : start + R], cos_BP[b], sin_BP[b], query_BHW[b, h, C:])
    _absorbed(table, layer.k_up, heads, q_BO, query_BHW, parts)
    _looked_latents(table, layer, place_B, page_BP, new_BW, query_BHW, rest_F, seen_BHC, parts)
    _valued(table, layer.v_up, seen_BHC, rest_F, mixed_BO, parts)
    spread(table, layer.out, mixed_BO, rest_F, y_BD, parts)
