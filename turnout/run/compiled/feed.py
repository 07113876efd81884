"""The feed-forward layers of a step: each expert that some row takes, read once for all rows that take it."""

import numpy as np

from turnout.run.compiled.curves import GATED, activated
from turnout.run.compiled.engine import kernel
from turnout.run.compiled.lanes import prange
from turnout.run.compiled.order import close_at, lay_out_at
from turnout.run.compiled.tables import INS, ORDER, OUTS, begins
from turnout.run.compiled.times import blocks_of, called, share, times

__all__ = ["brought", "fed", "grouped", "whole"]


@kernel()
def whole(rows, expert_G, start_G, row_R, weight_R, weight):
    """One group of all rows, for a layer that is always on."""
    expert_G[0], start_G[0], start_G[1] = 0, 0, rows
    for row in range(rows):
        row_R[row], weight_R[row] = row, weight
    return 1


@kernel()
def grouped(choice_BK, weight_BK, expert_G, start_G, row_R, weight_R):
    """The rows of each expert after each other; how many experts there are.

    Experts come in the order of their numbers: a row's outputs are added in an order that no other row decides.
    """
    rows, most = choice_BK.shape
    groups, end, last = 0, 0, -1
    start_G[0] = 0
    for _ in range(rows * most):
        e = -1  # the smallest that is left
        for b in range(rows):
            for k in range(most):
                if last < choice_BK[b, k] and (e < 0 or choice_BK[b, k] < e):
                    e = choice_BK[b, k]
        if e < 0:
            break
        for b in range(rows):
            weight, met = np.float32(0), False
            for k in range(most):
                if choice_BK[b, k] == e:
                    weight, met = weight + weight_BK[b, k], True
            if met:
                row_R[end], weight_R[end] = b, weight
                end += 1
        expert_G[groups] = e
        groups, last = groups + 1, e
        start_G[groups] = end
    return groups


@kernel(threaded=True)
def _widened(table, up, down, code, groups, expert_G, start_G, x_RD, wide_RH, act_RF, parts):
    """The activations of all groups, laid out; a thread makes the same part of each expert's gates and values."""
    hidden, order = table[down, INS], table[down, ORDER]
    for part in prange(parts):
        first, last = share(hidden, part, parts), share(hidden, part + 1, parts)
        for g in range(groups):
            start, end, e = start_G[g], start_G[g + 1], expert_G[g]
            wide_MH = wide_RH[start:end]
            if code < GATED and parts > 1:
                times(table, up, e, x_RD[start:end], wide_MH, first, last)
                times(table, up, e, x_RD[start:end], wide_MH, hidden + first, hidden + last)
            else:
                times(table, up, e, x_RD[start:end], wide_MH, first, wide_MH.shape[1] if code < GATED else last)
            activated(wide_MH, code, first, last, hidden)
            for r in range(start, end):
                lay_out_at(wide_RH[r, first:last], first, act_RF[r], order)


@kernel(threaded=True)
def _narrowed(table, down, groups, expert_G, start_G, row_R, weight_R, act_RF, made_RD, y_BD, parts):
    """Adds the weighted outputs of all groups to their rows; a thread makes the same part of each."""
    width = y_BD.shape[1]
    for part in prange(parts):
        first, last = share(width, part, parts), share(width, part + 1, parts)
        for g in range(groups):
            start, end = start_G[g], start_G[g + 1]
            times(table, down, expert_G[g], act_RF[start:end], made_RD[start:end], first, last)
            for r in range(start, end):
                y_D, made_D, weight = y_BD[row_R[r]], made_RD[r], weight_R[r]
                for d in range(first, last):
                    y_D[d] += weight * made_D[d]


@kernel()
def fed(table, up, down, code, groups, expert_G, start_G, row_R, weight_R, h_BD, y_BD, room_F, parts):
    """Adds to y what the experts of all groups make of their rows, weighted; rows before the first group stay out."""
    first, rows, width = start_G[0], start_G[groups], h_BD.shape[1]
    wide, hidden = table[up, OUTS], table[down, INS]
    size, full = blocks_of(width), blocks_of(hidden)
    at_made = rows * size
    at_wide = at_made + rows * width
    at_act = at_wide + rows * wide
    x_RD = room_F[:at_made].reshape(rows, size)
    made_RD = room_F[at_made:at_wide].reshape(rows, width)
    wide_RH = room_F[at_wide:at_act].reshape(rows, wide)
    act_RF = room_F[at_act : at_act + rows * full].reshape(rows, full)
    for r in range(first, rows):
        lay_out_at(h_BD[row_R[r]], 0, x_RD[r], table[up, ORDER])
        close_at(x_RD[r], width, table[up, ORDER])
        close_at(act_RF[r], hidden, table[down, ORDER])
    _widened(table, up, down, code, groups, expert_G, start_G, x_RD, wide_RH, act_RF, parts)
    _narrowed(table, down, groups, expert_G, start_G, row_R, weight_R, act_RF, made_RD, y_BD, parts)


@kernel()
def brought(layer, table, groups, expert_G, slot_G, start_G, row_R, weight_R, h_BD, y_BD, room_F, parts):
    """The same where experts come into slots: as many at a time as are there, in their order; whether all came.

    What ``layer.ready`` says is asked of Python, which waits for them (``turnout.run.swap.ready``).
    """
    done = 0
    while done < groups:
        told = layer.number, begins(expert_G[done:]), groups - done, done, begins(slot_G)
        count = called(layer.ready, told)
        if count < 1:
            return False
        given = slot_G, start_G[done:], row_R, weight_R, h_BD, y_BD, room_F, parts
        fed(table, layer.up, layer.down, layer.activation, count, *given)
        done += count
    return True
