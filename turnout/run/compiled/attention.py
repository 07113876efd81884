"""Attention of many new positions to all that stands before them: scores of a few queries at a time, which stay cached.

Keys are laid out so that 64 of them meet each number of a query at once, values as they lie, in the tiles of
``turnout.run.compiled.broads``; no position that a query does not see is multiplied but to fill a tile.
"""

import numpy as np
import torch
from torch import Tensor

from turnout.run.compiled.broad_tile import COLUMNS
from turnout.run.compiled.broads import lay, panel
from turnout.run.compiled.curves import bounded, grown
from turnout.run.compiled.dots import able
from turnout.run.compiled.engine import array, compiled_here, kernel, takes, threads
from turnout.run.compiled.lanes import prange
from turnout.run.compiled.narrow import narrow

__all__ = ["looks", "suits_looks"]

# Queries of a head whose scores exist at once, and the fewest that are worth laying keys and values out for.
_QUERIES, _FEWEST = 24, 16
_LANES = 32
_NONE = np.zeros(0, np.float32)


def suits_looks(q_BHSP: Tensor, k_BGTP: Tensor, v_BGTV: Tensor, sink_H: Tensor | None = None) -> bool:
    """Whether ``looks`` takes these here and now: many queries, wide heads, AVX-512, and no gradient asked.

    >>> suits_looks(*(torch.ones(1, 2, 32, 64, device="meta") for _ in range(3)))
    False

    Source: none; plain bookkeeping.
    """
    given = (q_BHSP, k_BGTP, v_BGTV) if sink_H is None else (q_BHSP, k_BGTP, v_BGTV, sink_H)
    return (
        q_BHSP.shape[2] >= _FEWEST
        and v_BGTV.shape[3] >= COLUMNS
        and not q_BHSP.shape[3] % 2
        and compiled_here()
        and takes(*given)
        and q_BHSP.dtype == k_BGTP.dtype == v_BGTV.dtype
        and able(q_BHSP.dtype)
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in given))
    )


def looks(
    q_BHSP: Tensor,
    k_BGTP: Tensor,
    v_BGTV: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """(B, S, H V) causal attention of the last S of T positions to all of them, or to the last ``window``.

    Args:
        q_BHSP: (B, H, S, P), any strides; all as ``suits_looks`` asks.
        k_BGTP: (B, G, T, P), G dividing H; T at least S.
        v_BGTV: (B, G, T, V).
        scale: of the scores.
        window: how many positions a query sees, its own among them.
        softcap: what scores are capped to, smoothly.
        sink_H: the score of a further term of each head's softmax, which no value belongs to.

    >>> q, k, v = (torch.ones(1, 2, 32, 64) for _ in range(3))
    >>> y = looks(q, k, v, scale=1.0) if suits_looks(q, k, v) else torch.ones(1, 32, 128)
    >>> y.shape, bool(((y - 1).abs() < 1e-5).all())
    (torch.Size([1, 32, 128]), True)

    Source: Vaswani et al., 2017, "Attention Is All You Need"; in blocks of queries as Rabe & Staats, 2021,
    "Self-attention Does Not Need O(n^2) Memory".
    """
    (B, H, S, _), (G, T, V) = q_BHSP.shape, v_BGTV.shape[1:]
    short, parts, seen = q_BHSP.dtype != torch.float32, threads(), -(-T // COLUMNS) * COLUMNS
    q, k = (one.contiguous().view(torch.int32) if short else one.contiguous() for one in (q_BHSP, k_BGTP))
    words, many = q.shape[3], 1 + short  # of a position, and how many numbers each holds
    keys, values = q.new_empty(B * G * seen * words), q.new_empty(B * G * -(-V // COLUMNS) * COLUMNS * seen // many)
    out_BSHV = q_BHSP.new_empty(B, S, H, V)
    score = q_BHSP.new_empty(parts * _QUERIES * seen, dtype=torch.float32)
    share = torch.empty_like(score, dtype=torch.bfloat16) if short else score
    flat = [array(one).reshape(-1) for one in (q, k, v_BGTV.contiguous(), out_BSHV, keys, values, score, share)]
    sinks = _NONE if sink_H is None else array(sink_H.detach().float().contiguous())
    cap = np.float32(0 if softcap is None else softcap)
    how, sizes = (np.float32(scale), cap, T if window is None else window), (B, H, G, S, T, V, words, seen, many)
    _looks(*flat, np.empty((parts, _LANES), np.float32), how, sinks, sizes, parts)
    return out_BSHV.flatten(2)


@kernel(exact=True)
def _lay_head(k, v, head, keys, values, T, V, words, seen, many):
    """Keys in panels of COLUMNS, number by number; values in panels of COLUMNS of their numbers."""
    for first in range(0, seen, COLUMNS):
        to = (head * seen + first) * words
        for j in range(words):
            for t in range(COLUMNS):
                keys[to] = k[(head * T + first + t) * words + j] if first + t < T else k[0] * 0
                to += 1
    columns = (V + COLUMNS - 1) // COLUMNS
    for column in range(columns):
        at = head * T * V + min(column * COLUMNS, V - COLUMNS)
        lay(v, at, V, T, many, values, (head * columns + column) * (seen // many) * COLUMNS)


@kernel(exact=True)
def _most(score_T, lane_L):
    """The largest of them that is a number, as far as there is one; LLVM makes vectors of lanes, but of no maximum."""
    lanes = lane_L.shape[0]
    lane_L[:] = -np.inf
    for first in range(0, score_T.shape[0] - lanes + 1, lanes):
        some_L = score_T[first : first + lanes]
        for place in range(lanes):
            lane_L[place] = some_L[place] if some_L[place] > lane_L[place] else lane_L[place]
    most = np.float32(-np.inf)
    for place in range(lanes):
        most = max(most, lane_L[place])
    for score in score_T[score_T.shape[0] // lanes * lanes :]:
        most = score if score > most else most
    return most


@kernel()
def _capped(score_T, scale, softcap):
    for t in range(score_T.shape[0]):
        score_T[t] = softcap * bounded(score_T[t] * scale / softcap)


@kernel()
def _softened(score_T, sink, scale, lane_L):
    """The softmax of these scores in place, with one more term e^sink that no position belongs to."""
    most = max(_most(score_T, lane_L) * scale, sink)
    total = grown(sink - most)
    for t in range(score_T.shape[0]):
        score_T[t] = grown(score_T[t] * scale - most)
        total += score_T[t]
    inverse = np.float32(1) / total
    for t in range(score_T.shape[0]):
        score_T[t] *= inverse


@kernel(exact=True)
def _rounded(score_T, share_T):
    for t in range(score_T.shape[0]):
        share_T[t] = narrow(score_T[t], share_T[0])


@kernel(exact=True)
def _shares(score_T, low, high, sink, softcap, scale, share_T, many, lane_L):
    """The softmax of scores from low to high, and 0 around them; in 16 bits rounded to shares."""
    seen_T = score_T[low:high]
    if softcap > np.float32(0):
        _capped(seen_T, scale, softcap)
        _softened(seen_T, sink, np.float32(1), lane_L)
    else:
        _softened(seen_T, sink, scale, lane_L)
    score_T[:low] = 0
    score_T[high:] = 0
    if many == 2:
        _rounded(score_T, share_T)


@kernel(threaded=True, exact=True)
def _looks(q, k, v, out, keys, values, score, share, lanes, how, sinks, sizes, parts):
    (scale, softcap, window), (B, H, G, S, T, V, words, seen, many) = how, sizes
    for part in prange(parts):
        for head in range(part, B * G, parts):
            _lay_head(k, v, head, keys, values, T, V, words, seen, many)
    blocks, columns = (S + _QUERIES - 1) // _QUERIES, (V + COLUMNS - 1) // COLUMNS
    for part in prange(parts):
        room = part * _QUERIES * seen
        for job in range(part, B * H * blocks, parts):
            item, s = job // blocks, job % blocks * _QUERIES
            b, h = item // H, item % H
            head, rows, sees = b * G + h // (H // G), min(_QUERIES, S - s), T - S + s + 1
            first = max(0, sees - window) // COLUMNS * COLUMNS
            last = (sees + rows - 1 + many - 1) // many * many
            sink = sinks[h] if sinks.shape[0] else np.float32(-np.inf)
            for t in range(first, last, COLUMNS):
                at, to = (head * seen + t) * words, room + t
                panel(q, (item * S + s) * words, words, 1, rows, keys, at, words, score, to, seen, k, -1, 0, 0, 1)
            for m in range(rows):
                low, high, at = max(0, sees + m - window) - first, sees + m - first, room + m * seen
                score_T, share_T = score[at + first : at + last], share[at + first : at + last]
                _shares(score_T, low, high, sink, softcap, scale, share_T, many, lanes[part])
            for column in range(columns):
                at = ((head * columns + column) * (seen // many) + first // many) * COLUMNS
                to = ((b * S + s) * H + h) * V + min(column * COLUMNS, V - COLUMNS)
                panel(
                    share,
                    room + first,
                    seen,
                    many,
                    rows,
                    values,
                    at,
                    (last - first) // many,
                    out,
                    to,
                    H * V,
                    v,
                    -1,
                    0,
                    0,
                    1,
                )
