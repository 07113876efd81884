"""One step of a decoder: a token for each row in, the scores of the next ones out, all in one call."""

import numpy as np

from turnout.run.compiled.curves import activated, bounded, grown
from turnout.run.compiled.engine import kernel
from turnout.run.compiled.lanes import wide
from turnout.run.compiled.look import looked, stored
from turnout.run.compiled.norms import angles, normed, turned
from turnout.run.compiled.route import chosen
from turnout.run.compiled.tables import FLOAT, brains, floats, wholes
from turnout.run.compiled.times import times

__all__ = ["step"]


@kernel()
def _cut(room_F, start, rows, columns):
    """(rows, columns) of the room, from there."""
    return room_F[start : start + rows * columns].reshape(rows, columns)


@kernel()
def _copied(from_D, to_D):
    for d in range(from_D.shape[0]):
        to_D[d] = from_D[d]


@kernel()
def _before(norms, which, x_BD, out_BD):
    """The normed rows, or the rows where there is no such norm."""
    for b in range(x_BD.shape[0]):
        if which >= 0:
            normed(norms[which], x_BD[b], out_BD[b])
        else:
            _copied(x_BD[b], out_BD[b])


@kernel()
def _added(norms, which, residual, change_BD, x_BD):
    """X and what a layer makes of it, normed where there is a norm, and scaled."""
    for b in range(x_BD.shape[0]):
        if which >= 0:
            normed(norms[which], change_BD[b], change_BD[b])
        for d in range(x_BD.shape[1]):
            x_BD[b, d] += change_BD[b, d] * residual


@kernel()
def _heads(layer, norms, first, count, which, row_Q, cos_P, sin_P):
    """The norm and the rotation of some heads of a row, in place."""
    W = layer.head_width
    if which >= 0 and layer.qk_full != 0:
        normed(norms[which], row_Q[first : first + count * W], row_Q[first : first + count * W])
    for h in range(count):
        head_W = row_Q[first + h * W : first + (h + 1) * W]
        if which >= 0 and layer.qk_full == 0:
            normed(norms[which], head_W, head_W)
        if layer.rotated != 0:
            turned(head_W, cos_P, sin_P)


@kernel()
def attention(layer, norms, matrices, h_BD, place_B, cos_BP, sin_BP, room_F, y_BD):
    """What the attention of a layer makes of normed rows; their keys and values are added to the cache."""
    B, H, G, W = h_BD.shape[0], layer.heads, layer.key_heads, layer.head_width
    share, size, slots = H // G, 4 if layer.cache_code == FLOAT else 2, layer.slots
    qkv_BO = _cut(room_F, 0, B, (H + 2 * G) * W)
    mixed_BQ = _cut(room_F, qkv_BO.size, B, H * W)
    score_F = room_F[qkv_BO.size + mixed_BQ.size :]
    times(matrices[layer.qkv], 0, h_BD, qkv_BO)
    sinks_H = floats(layer.sinks, H if layer.sinks != 0 else 0)
    for b in range(B):
        row_Q, place = qkv_BO[b], place_B[b]
        _heads(layer, norms, 0, H, layer.q_norm, row_Q, cos_BP[b], sin_BP[b])
        _heads(layer, norms, H * W, G, layer.k_norm, row_Q, cos_BP[b], sin_BP[b])
        slot, seen = place, place + 1
        if layer.window > 0:
            slot, seen = place % layer.window, min(seen, layer.window)
        for g in range(G):
            at, k = ((b * G + g) * slots) * W * size, (H + g) * W
            stored(layer.cache_code, layer.keys + at + slot * W * size, row_Q[k : k + W])
            stored(layer.cache_code, layer.values + at + slot * W * size, row_Q[k + G * W : k + (G + 1) * W])
            q_GW = row_Q[g * share * W : (g + 1) * share * W].reshape(share, W)
            out_GW = mixed_BQ[b, g * share * W : (g + 1) * share * W].reshape(share, W)
            sinks_G = sinks_H[g * share : (g + 1) * share] if layer.sinks != 0 else sinks_H
            score_GT = _cut(score_F, 0, share, seen)
            keys, values = layer.keys + at, layer.values + at
            looked(layer.cache_code, keys, values, seen, q_GW, sinks_G, layer.softcap, layer.scale, score_GT, out_GW)
    times(matrices[layer.out], 0, mixed_BQ, y_BD)


@kernel()
def _through(up, down, e, activation, x_MD, room_F, y_MD):
    """What one expert, or the dense feed-forward layer, makes of rows."""
    M, H, F = x_MD.shape[0], up.outputs, down.inputs
    wide_MH = _cut(room_F, 0, M, H)
    out_MF = _cut(room_F, M * H, M, F)
    times(up, e, x_MD, wide_MH)
    activated(wide_MH, activation, out_MF)
    times(down, e, out_MF, y_MD)


@kernel()
def _experts(layer, up, down, h_BD, choice_BK, weight_BK, room_F, y_BD):
    """The weighted sum of each row's experts; an expert is read once for all rows that take it."""
    B, D = h_BD.shape
    K = choice_BK.shape[1]
    row_F, made_F, rest_F = room_F[: B * D], room_F[B * D : 2 * B * D], room_F[2 * B * D :]
    for b in range(B):
        for d in range(D):
            y_BD[b, d] = np.float32(0)
    for first in range(B * K):
        e, count = choice_BK[first // K, first % K], 0
        if e < 0:
            continue
        for b in range(first // K, B):
            for k in range(K):
                if choice_BK[b, k] == e:
                    _copied(h_BD[b], row_F[count * D : (count + 1) * D])
                    count += 1
                    break
        made_MD = made_F[: count * D].reshape(count, D)
        _through(up, down, e, layer.activation, row_F[: count * D].reshape(count, D), rest_F, made_MD)
        count = 0
        for b in range(first // K, B):
            weight, met = np.float32(0), False
            for k in range(K):
                if choice_BK[b, k] == e:
                    weight, met, choice_BK[b, k] = weight + weight_BK[b, k], True, -1
            if met:
                for d in range(D):
                    y_BD[b, d] += weight * made_MD[count, d]
                count += 1


@kernel()
def _always(layer, up, down, h_BD, room_F, y_BD):
    """Adds what the shared expert makes of rows, under its gate."""
    B, D = h_BD.shape
    made_BD = _cut(room_F, 0, B, D)
    _through(up, down, 0, layer.activation, h_BD, room_F[B * D :], made_BD)
    for b in range(B):
        open_ = np.float32(1)
        if layer.shared_gate != 0:
            gate_D, logit = floats(layer.shared_gate, D), np.float32(0)
            for d in range(D):
                logit += gate_D[d] * h_BD[b, d]
            open_ = np.float32(1) / (np.float32(1) + grown(-logit))
        for d in range(D):
            y_BD[b, d] += open_ * made_BD[b, d]


@kernel()
def feed_forward(layer, matrices, h_BD, room_F, y_BD):
    """What the feed-forward layer, dense or routed, makes of normed rows."""
    B, K = h_BD.shape[0], layer.top_k
    if layer.routed == 0:
        _through(matrices[layer.up], matrices[layer.down], 0, layer.activation, h_BD, room_F, y_BD)
        return
    logit_BE = _cut(room_F, 0, B, matrices[layer.router].outputs)
    weight_BK = _cut(room_F, logit_BE.size, B, K)
    choice_BK = np.empty((B, K), np.int64)
    times(matrices[layer.router], 0, h_BD, logit_BE)
    for b in range(B):
        chosen(layer, logit_BE[b], choice_BK[b], weight_BK[b])
        if layer.labels != 0:
            label_E = wholes(layer.labels, logit_BE.shape[1])
            for k in range(K):
                choice_BK[b, k] = label_E[choice_BK[b, k]]
    rest_F = room_F[logit_BE.size + weight_BK.size :]
    _experts(layer, matrices[layer.up], matrices[layer.down], h_BD, choice_BK, weight_BK, rest_F, y_BD)
    if layer.shared_up >= 0:
        _always(layer, matrices[layer.shared_up], matrices[layer.shared_down], h_BD, room_F, y_BD)


@kernel()
def _embedded(address, code, index, scale, x_D, adds):
    """A row of a table of embeddings, scaled, in the place of x or added to it."""
    D = x_D.shape[0]
    if code == FLOAT:
        row_D = floats(address + index * D * 4, D)
        for d in range(D):
            x_D[d] = row_D[d] * scale + (x_D[d] if adds else np.float32(0))
    else:
        bits_D = brains(address + index * D * 2, D)
        for d in range(D):
            x_D[d] = wide(bits_D[d]) * scale + (x_D[d] if adds else np.float32(0))


@kernel()
def step(models, layers, norms, matrices, id_B, place_B, room_F, logits_BV):
    """One token of each row at its place: all layers, and the scores of the next tokens."""
    model, B, V = models[0], id_B.shape[0], logits_BV.shape[1]
    D, P = model.width, model.pairs
    x_BD, h_BD, y_BD = _cut(room_F, 0, B, D), _cut(room_F, B * D, B, D), _cut(room_F, 2 * B * D, B, D)
    at = 3 * B * D
    cos_BP, sin_BP = _cut(room_F, at, B, P), _cut(room_F, at + B * P, B, P)
    near_cos_BP, near_sin_BP = _cut(room_F, at + 2 * B * P, B, P), _cut(room_F, at + 3 * B * P, B, P)
    rest_F = room_F[at + 4 * B * P :]
    angles(model.frequencies, place_B, model.magnitude, cos_BP, sin_BP)
    if model.local_frequencies != 0:
        angles(model.local_frequencies, place_B, np.float32(1), near_cos_BP, near_sin_BP)
    for b in range(B):
        _embedded(model.embedding, model.embedding_code, id_B[b], model.embedding_scale, x_BD[b], False)
        if model.positions != 0:
            _embedded(model.positions, model.positions_code, place_B[b], np.float32(1), x_BD[b], True)
    for number in range(layers.shape[0]):
        layer = layers[number]
        cos, sin = (near_cos_BP, near_sin_BP) if layer.local != 0 else (cos_BP, sin_BP)
        _before(norms, layer.norm, x_BD, h_BD)
        attention(layer, norms, matrices, h_BD, place_B, cos, sin, rest_F, y_BD)
        _added(norms, layer.out_norm, layer.residual, y_BD, x_BD)
        _before(norms, layer.ff_norm, x_BD, h_BD)
        feed_forward(layer, matrices, h_BD, rest_F, y_BD)
        _added(norms, layer.ff_out_norm, layer.residual, y_BD, x_BD)
    _before(norms, model.norm, x_BD, h_BD)
    times(matrices[model.head], 0, h_BD, logits_BV)
    for b in range(B):
        for v in range(V):
            logit = logits_BV[b, v] / model.divisor
            logits_BV[b, v] = model.softcap * bounded(logit / model.softcap) if model.softcap > np.float32(0) else logit
