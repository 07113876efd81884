"""One step of a decoder: tokens in, the scores of those that come after some of them out, all in one call."""

import numpy as np

from turnout.run.compiled.curves import bounded, grown
from turnout.run.compiled.engine import kernel
from turnout.run.compiled.feed import brought, fed, grouped, whole
from turnout.run.compiled.lanes import wide
from turnout.run.compiled.latent import latent_attention
from turnout.run.compiled.look import looked_all
from turnout.run.compiled.norms import angles, normed, turned
from turnout.run.compiled.route import chosen
from turnout.run.compiled.tables import BRAIN, FLOAT, OUTS, brains, floats, halves, wholes
from turnout.run.compiled.times import laid_out, spread, times

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
def _attention(layer, norms, table, h_BD, place_B, page_BP, cos_BP, sin_BP, room_F, y_BD, parts):
    """What the attention of a layer makes of normed rows; their keys and values are added to the pages."""
    rows, heads, key_heads, width = h_BD.shape[0], layer.heads, layer.key_heads, layer.head_width
    qkv_BO = _cut(room_F, 0, rows, (heads + 2 * key_heads) * width)
    mixed_BQ = _cut(room_F, qkv_BO.size, rows, heads * width)
    score_F = room_F[qkv_BO.size + mixed_BQ.size :]
    spread(table, layer.qkv, h_BD, score_F, qkv_BO, parts)
    for b in range(rows):
        _heads(layer, norms, 0, heads, layer.q_norm, qkv_BO[b], cos_BP[b], sin_BP[b])
        _heads(layer, norms, heads * width, key_heads, layer.k_norm, qkv_BO[b], cos_BP[b], sin_BP[b])
    looked_all(table, layer, place_B, page_BP, qkv_BO, score_F, mixed_BQ, parts)
    spread(table, layer.out, mixed_BQ, score_F, y_BD, parts)


@kernel()
def _routed(layer, table, h_BD, rank_B, room_F, logit_BE, weight_BK, choice_BK):
    """Which experts each row takes, and with what weight; -1 stands for no one."""
    times(table, layer.router, 0, laid_out(table, layer.router, h_BD, room_F), logit_BE, 0, logit_BE.shape[1])
    told_BK = wholes(layer.routes, choice_BK.size if layer.routes != 0 else 0)
    told_BK = told_BK.reshape(h_BD.shape[0] if layer.routes != 0 else 0, choice_BK.shape[1])
    for b in range(h_BD.shape[0]):
        chosen(layer, logit_BE[b], choice_BK[b], weight_BK[b], rank_B[b])
        if layer.routes != 0:
            for k in range(choice_BK.shape[1]):
                told_BK[b, k] = choice_BK[b, k]
        if layer.labels != 0:
            label_E = wholes(layer.labels, logit_BE.shape[1])
            for k in range(choice_BK.shape[1]):
                if choice_BK[b, k] >= 0:
                    choice_BK[b, k] = label_E[choice_BK[b, k]]


@kernel()
def _feed_forward(layer, table, h_BD, rank_B, room_F, room_I, y_BD, parts):
    """What the feed-forward layer, dense or routed, makes of normed rows; whether all its experts could be had."""
    rows, most, width = h_BD.shape[0], max(layer.top_k, 1), h_BD.shape[1]
    entries = rows * most
    expert_G, start_G, row_R = room_I[:entries], room_I[entries : 2 * entries + 1], room_I[2 * entries + 1 :]
    weight_R, rest_F = room_F[:entries], room_F[entries:]
    for b in range(rows):
        for d in range(width):
            y_BD[b, d] = np.float32(0)
    if layer.routed == 0:
        groups = whole(rows, expert_G, start_G, row_R, weight_R, np.float32(1))
    else:
        logit_BE = _cut(rest_F, 0, rows, table[layer.router, OUTS])
        weight_BK = _cut(rest_F, logit_BE.size, rows, most)
        choice_BK = room_I[3 * entries + 1 : 4 * entries + 1].reshape(rows, most)
        _routed(layer, table, h_BD, rank_B, rest_F[logit_BE.size + weight_BK.size :], logit_BE, weight_BK, choice_BK)
        groups = grouped(choice_BK, weight_BK, expert_G, start_G, row_R, weight_R)
    code = layer.activation
    if layer.ready != 0:
        slot_G = room_I[4 * entries + 1 : 5 * entries + 1]
        given = expert_G, slot_G, start_G, row_R, weight_R, h_BD, y_BD, rest_F, parts
        if not brought(layer, table, groups, *given):
            return False
    else:
        fed(table, layer.up, layer.down, code, groups, expert_G, start_G, row_R, weight_R, h_BD, y_BD, rest_F, parts)
    if layer.shared_up < 0:
        return True
    groups = whole(rows, expert_G, start_G, row_R, weight_R, np.float32(1))
    if layer.shared_gate != 0:
        gate_D = floats(layer.shared_gate, width)
        for b in range(rows):
            logit = np.float32(0)
            for d in range(width):
                logit += gate_D[d] * h_BD[b, d]
            weight_R[b] = np.float32(1) / (np.float32(1) + grown(-logit))
    up, down = layer.shared_up, layer.shared_down
    fed(table, up, down, code, groups, expert_G, start_G, row_R, weight_R, h_BD, y_BD, rest_F, parts)
    return True


@kernel()
def _embedded(address, code, index, scale, x_D, adds):
    """A row of a table of embeddings, scaled, in the place of x or added to it."""
    D = x_D.shape[0]
    if not adds:
        for d in range(D):
            x_D[d] = np.float32(0)
    if code == FLOAT:
        row_D = floats(address + index * D * 4, D)
        for d in range(D):
            x_D[d] += row_D[d] * scale
    elif code == BRAIN:
        brain_D = brains(address + index * D * 2, D)
        for d in range(D):
            x_D[d] += wide(brain_D[d]) * scale
    else:
        half_D = halves(address + index * D * 2, D)
        for d in range(D):
            x_D[d] += wide(half_D[d]) * scale


@kernel()
def step(models, layers, norms, table, id_B, place_B, page_GBP, rank_B, asked_N, room_F, room_I, logits_NV, parts):
    """One token of each row at its place in its text: all layers, and what comes after the rows that are asked for.

    For each group of layers ``page_GBP`` says in which pages a row's text is. Rows with the same pages are of one text,
    whose tokens before them are in the pages or among them. A row with a rank above 0 takes in each routed layer its
    one expert of that rank (``turnout.models.Contrast``). Whether it came to an end: not where experts could not be
    had.
    """
    model, B, N, V = models[0], id_B.shape[0], asked_N.shape[0], logits_NV.shape[1]
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
        page_BP = page_GBP[layer.group]
        _before(norms, layer.norm, x_BD, h_BD)
        if layer.latent != 0:
            latent_attention(layer, norms, table, h_BD, place_B, page_BP, cos, sin, rest_F, y_BD, parts)
        else:
            _attention(layer, norms, table, h_BD, place_B, page_BP, cos, sin, rest_F, y_BD, parts)
        _added(norms, layer.out_norm, layer.residual, y_BD, x_BD)
        _before(norms, layer.ff_norm, x_BD, h_BD)
        if not _feed_forward(layer, table, h_BD, rank_B, rest_F, room_I, y_BD, parts):
            return False
        _added(norms, layer.ff_out_norm, layer.residual, y_BD, x_BD)
    for n in range(N):
        _copied(x_BD[asked_N[n]], y_BD[n])
    _before(norms, model.norm, y_BD[:N], h_BD[:N])
    spread(table, model.head, h_BD[:N], rest_F, logits_NV, parts)
    for n in range(N):
        for v in range(V):
            logit = logits_NV[n, v] / model.divisor
            logits_NV[n, v] = model.softcap * bounded(logit / model.softcap) if model.softcap > np.float32(0) else logit
    return True
