"""A whole layer of experts for few tokens in one call: gather, gate and up, activation, down, weighted sum."""

import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from turnout.run.compiled.engine import array, compiled_here, kernel, takes
from turnout.run.compiled.formats import FLOATS, blocks, knows, matrices, meets_short
from turnout.run.compiled.lanes import prange, wide
from turnout.run.compiled.order import close, lay_out, lay_row, order
from turnout.run.compiled.pointwise import KINDS, gated
from turnout.run.compiled.span import span_before
from turnout.run.slots import Slots
from turnout.types import ExpertWeights, Routing
from turnout.types.packed import Packed
from turnout.types.weights import GATED

__all__ = ["experts_times", "few_rows", "suits_experts", "suits_few_rows"]

# As many outputs as one thread makes at a time; whole blocks.
_CHUNK = 64


def suits_few_rows(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> bool:
    """Whether ``few_rows`` takes these here and now; not whether it is the fastest, and whatever gradients are asked.

    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> suits_few_rows(torch.ones(1, 3), routing, ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 2, 3)))
    False

    Source: none; plain bookkeeping.
    """
    up_EHD, down_EDF = weights.up_EDH.transpose(1, 2), weights.down_EFD.transpose(1, 2)
    return suits_experts(x_TD, routing, up_EHD, down_EDF, weights.up_bias_EH, weights.down_bias_ED)


def suits_experts(
    x_TD: Tensor,
    routing: Routing,
    up_EHD: Tensor | Packed,
    down_EDF: Tensor | Packed,
    up_bias_EH: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
) -> bool:
    """Whether ``experts_times`` takes these here and now, whatever gradients are asked.

    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> suits_experts(torch.ones(1, 3), routing, torch.ones(2, 4, 3, device="meta"), torch.ones(2, 3, 2))
    False

    Source: none; plain bookkeeping.
    """
    biases = [bias for bias in (up_bias_EH, down_bias_ED) if bias is not None]
    return (
        compiled_here()
        and x_TD.dtype in FLOATS
        and takes(x_TD, routing.token_R, routing.weight_R, routing.offset_E, *biases)
        and routing.weight_R.dtype in FLOATS
        and type(up_EHD) is type(down_EDF)
        and knows(up_EHD, x_TD.dtype)
        and knows(down_EDF, x_TD.dtype)
        and all(bias.dtype in (torch.float32, x_TD.dtype) and bias.is_contiguous() for bias in biases)
    )


def few_rows(x_TD: Tensor, routing: Routing, weights: ExpertWeights, slots: Slots | None = None) -> Tensor:
    """(T, D) each token's weighted sum of its experts' outputs, for weights stored (out, in). No gradients.

    Args:
        x_TD: (T, D), the tokens; all three as ``suits_few_rows`` asks.
        routing: which experts each takes, and with what weight.
        weights: the experts.
        slots: where they come into slots; the weights are its ``like`` then.

    Returns:
        (T, D) in x's dtype, summed in fp32 throughout; tokens without entries are zero.

    Raises:
        MissingExtraError: nothing can be compiled here.

    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> up_EHD, down_EDF = torch.ones(2, 4, 3), torch.ones(2, 3, 4)
    >>> weights = ExpertWeights(up_EHD.transpose(1, 2), down_EDF.transpose(1, 2), activation="relu")
    >>> few_rows(torch.ones(1, 3), routing, weights) if compiled_here() else torch.full((1, 3), 6.0)
    tensor([[6., 6., 6.]])

    Source: Shazeer et al., 2017, "Outrageously Large Neural Networks", equation 1.
    """
    return experts_times(
        x_TD,
        routing,
        weights.up_EDH.transpose(1, 2),
        weights.down_EFD.transpose(1, 2),
        weights.up_bias_EH,
        weights.down_bias_ED,
        activation=weights.activation,
        interleaved=weights.interleaved,
        slots=slots,
    )


def experts_times(
    x_TD: Tensor,
    routing: Routing,
    up_EHD: Tensor | Packed,
    down_EDF: Tensor | Packed,
    up_bias_EH: Tensor | None = None,
    down_bias_ED: Tensor | None = None,
    *,
    activation: str = "swiglu",
    interleaved: bool = False,
    slots: Slots | None = None,
) -> Tensor:
    """``few_rows`` for stacks as they lie, floating or in few bits.

    Args:
        x_TD: (T, D), the tokens; all as ``suits_experts`` asks.
        routing: which experts each takes, and with what weight.
        up_EHD: (E, H, D), H = 2F for a gated activation and F otherwise.
        down_EDF: (E, D, F).
        up_bias_EH: (E, H) or None.
        down_bias_ED: (E, D) or None.
        activation: as ``turnout.run.activate``.
        interleaved: whether gate and value alternate, rather than being halves.
        slots: where experts come into slots; the stacks are those of its ``like`` then.

    Raises:
        MissingExtraError: nothing can be compiled here.
        ShapeError: a routing made by hand whose entries are none of these tokens or experts.

    >>> routing = Routing.from_topk(torch.tensor([[0]]), torch.tensor([[0.5]]), num_experts=1)
    >>> given = torch.ones(1, 3), routing, torch.ones(1, 4, 3), torch.ones(1, 3, 4)
    >>> experts_times(*given, activation="relu") if compiled_here() else torch.full((1, 3), 6.0)
    tensor([[6., 6., 6.]])

    Source: none; one pass over the memory of what is chosen.
    """
    out_TD = x_TD.new_empty(x_TD.shape, dtype=torch.float32)
    given = up_bias_EH, down_bias_ED, activation, interleaved
    if slots is None:
        _into(out_TD, x_TD, routing, (up_EHD, down_EDF), given, _itself(routing.num_experts), adds=False)
    else:
        out_TD.zero_()
        for some, place_E, stacks in _parts(routing, slots, (up_EHD, down_EDF)):
            _into(out_TD, x_TD, some, stacks, given, array(place_E), adds=True)
    return out_TD if x_TD.dtype == torch.float32 else out_TD.to(x_TD.dtype)


def _parts(
    routing: Routing, slots: Slots, stacks: tuple[Tensor | Packed, Tensor | Packed]
) -> Iterator[tuple[Routing, Tensor, tuple[Tensor | Packed, Tensor | Packed]]]:
    """The entries of as many experts as come at once, the slot of each, and the slots' matrices (O, I)."""
    like, held = slots.like, slots.held
    if isinstance(like, ExpertWeights) and isinstance(held, ExpertWeights):
        stacks = held.up_EDH.transpose(1, 2), held.down_EFD.transpose(1, 2)
    else:
        stacks = slots.stack(stacks[0]), slots.stack(stacks[1])
    active = routing.load_E.nonzero().flatten().tolist()
    for place, there in slots.some(active):
        place_E = slots.place(active[place], there)
        whole = len(there) == len(active)
        yield routing if whole else routing.keep(place_E[routing.expert_R] >= 0), place_E, stacks


def _into(
    out_TD: Tensor,
    x_TD: Tensor,
    routing: Routing,
    stacks: tuple[Tensor | Packed, Tensor | Packed],
    given: tuple[Tensor | None, Tensor | None, str, bool],
    place_E: np.ndarray,
    *,
    adds: bool,
) -> None:
    """Writes the layer's output in fp32 to ``out_TD``, or adds it; ``place_E`` says which matrix is whose."""
    (up_EHD, down_EDF), (up_bias_EH, down_bias_ED, activation, interleaved) = stacks, given
    (tokens, width), entries = x_TD.shape, routing.token_R.shape[0]
    hidden, outs = down_EDF.shape[-1], up_EHD.shape[-2]
    made = functools.partial(x_TD.new_empty, dtype=torch.float32)
    room = made(entries * (width + outs + hidden))
    rows = made((tokens + entries) * blocks(width) + entries * blocks(hidden))
    short = all(meets_short(stack, x_TD.dtype) for stack in (up_EHD, down_EDF))
    sizes = [blocks(size) * (2 if short else 1) for size in (width, hidden)]
    gates = (2 if interleaved else 1) if activation in GATED else 0
    sound = _experts(
        array(x_TD.contiguous()).reshape(-1),
        (array(routing.token_R), array(routing.offset_E), array(routing.weight_R.contiguous()), place_E),
        matrices(up_EHD).told,
        matrices(down_EDF).told,
        (_flat(up_bias_EH, up_EHD), _flat(down_bias_ED, down_EDF)),
        (tokens, width, sizes[0], outs, hidden, sizes[1], KINDS[activation], gates, adds),
        np.empty(routing.num_experts, np.int64),
        array(rows.view(torch.bfloat16) if short else rows),
        array(room),
        array(out_TD).reshape(-1),
    )
    if not sound:
        routing.validate()


@functools.cache
def _itself(experts: int) -> np.ndarray:
    return np.arange(experts)


def _flat(bias: Tensor | None, weight: Tensor | Packed) -> np.ndarray:
    """The bias, or an empty one of the type that it most likely has, so that fewer kernels are compiled."""
    return (
        _none(weight.dtype if isinstance(weight, Tensor) else torch.float32)
        if bias is None
        else array(bias).reshape(-1)
    )


@functools.cache
def _none(dtype: torch.dtype) -> np.ndarray:
    return array(torch.empty(0, dtype=dtype, device="cpu"))


@kernel(exact=True)
def _sound(token_R, offset_E, tokens):
    """Whether a kernel may read where it is told to: a routing made by hand may say anything."""
    sound = offset_E[0] == 0 and offset_E[-1] == token_R.shape[0]
    for e in range(offset_E.shape[0] - 1):
        sound = sound and offset_E[e] <= offset_E[e + 1]
    for r in range(token_R.shape[0]):
        sound = sound and 0 <= token_R[r] < tokens
    return sound


@kernel(exact=True)
def _shift(h_N, bias_N):
    for n in range(h_N.shape[0]):
        h_N[n] += wide(bias_N[n])


@kernel(exact=True)
def _activate(h, at, step, beside, bias, at_bias, kind, gates, first, last, made_F, a_F, order):
    """Numbers [first, last) of one row's activations, from its up product h[at:] and its bias, laid out for down.

    They are made in memory of their own: where a loop writes to what it reads, LLVM makes no vectors of it.
    """
    low, high, beside = step * first, step * last, beside if gates else 0
    if bias.shape[0]:
        _shift(h[at + low : at + high], bias[at_bias + low : at_bias + high])
        if gates and step == 1:
            _shift(h[at + low + beside : at + high + beside], bias[at_bias + low + beside : at_bias + high + beside])
    if step == 1:
        gated(kind, gates, h[at + first : at + last], h[at + first + beside : at + last + beside], made_F)
    else:
        turn_F = h[at + low : at + high : 2]
        gated(kind, gates, turn_F, h[at + low + beside : at + high + beside : 2], made_F)
    lay_out(made_F, first, a_F, order)


@kernel(exact=True)
def _weigh(y, at, bias, at_bias, weight, first, last):
    """Numbers [first, last) of one row's result, with its bias, times its weight."""
    y_D = y[at + first : at + last]
    if bias.shape[0]:
        _shift(y_D, bias[at_bias + first : at_bias + last])
    for d in range(y_D.shape[0]):
        y_D[d] *= weight


@kernel(exact=True)
def _next(weights, active_E, place_E, count, job, each, size):
    """Where the weights of the job after this one begin, or its own where it is the last."""
    job = min(job + 1, count * each - 1)
    return place_E[active_E[job // each]] * weights[3] + job % each * size * weights[4]


@kernel(exact=True)
def _active(offset_E, active_E):
    """Writes which experts have entries, and gives how many."""
    count = 0
    for e in range(active_E.shape[0]):
        if offset_E[e] < offset_E[e + 1]:
            active_E[count] = e
            count += 1
    return count


@kernel(exact=True)
def _beside(active_N, offset_E, token_R, rows_x, at_rows, width):
    """Copies the rows of each expert that has several side by side."""
    for e in active_N:
        if offset_E[e] + 1 < offset_E[e + 1]:
            for r in range(offset_E[e], offset_E[e + 1]):
                own, its = at_rows + r * width, token_R[r] * width
                rows_x[own : own + width] = rows_x[its : its + width]


@kernel(exact=True)
def _summed(y, token_R, width, tokens, adds, first, last, out):
    """Numbers [first, last) of every token's sum of its entries' results, added to what is there or in its place."""
    for t in range(0 if adds else tokens):
        out[t * width + first : t * width + last] = 0
    for r in range(token_R.shape[0]):
        at = token_R[r] * width
        out_D, y_D = out[at + first : at + last], y[r * width + first : r * width + last]
        for d in range(out_D.shape[0]):
            out_D[d] += y_D[d]


@kernel(threaded=True, exact=True)
def _experts(x, decided, up, down, biases, sizes, active_E, rows_x, room, out):
    """The layer, and True; or False, and nothing, where the routing is not sound.

    ``active_E``, ``rows_x`` for rows that meet a matrix, in the dtype that they meet it in, and ``room`` are its
    scratch. Tokens are laid out once; experts with several rows have copies of theirs side by side.
    """
    token_R, offset_E, weight_R, place_E = decided
    up_bias, down_bias = biases
    tokens, width, wide_width, outs, hidden, wide_hidden, kind, gates, adds = sizes
    entries = token_R.shape[0]
    if not _sound(token_R, offset_E, tokens):
        return False
    at_rows = tokens * wide_width
    at_a = at_rows + entries * wide_width
    at_h = entries * width
    at_made = at_h + entries * outs
    step, beside = (2, 1) if gates == 2 else (1, hidden)
    count = _active(offset_E, active_E)
    for t in range(tokens):
        row = rows_x[t * wide_width : (t + 1) * wide_width]
        lay_row(x[t * width : (t + 1) * width], row, order(up[0], rows_x))
    _beside(active_E[:count], offset_E, token_R, rows_x, at_rows, wide_width)
    for r in range(entries):
        a = at_a + r * wide_hidden
        close(rows_x[a : a + wide_hidden], hidden, order(down[0], rows_x))
    each = (hidden + _CHUNK - 1) // _CHUNK
    for job in prange(count * each):
        e, first = active_E[job // each], job % each * _CHUNK
        r, last = offset_E[e], min(hidden, first + _CHUNK)
        rows, to = offset_E[e + 1] - r, at_h + r * outs
        of = token_R[r] * wide_width if rows == 1 else at_rows + r * wide_width
        low, high = step * first, step * last
        s = place_E[e]
        at, at_scale, then = s * up[3], s * outs * up[5], _next(up, active_E, place_E, count, job, each, step * _CHUNK)
        if gates == 1:
            value = at + (low + hidden) * up[4]
            span_before(up, at, at_scale, rows_x, of, wide_width, rows, room, to, outs, low, high, value)
            low, high = low + hidden, high + hidden
        span_before(up, at, at_scale, rows_x, of, wide_width, rows, room, to, outs, low, high, then)
        for m in range(r, r + rows):
            h, a, made = at_h + m * outs, at_a + m * wide_hidden, at_made + m * hidden
            a_F, laid, made_F = rows_x[a : a + wide_hidden], order(down[0], rows_x), room[made + first : made + last]
            _activate(room, h, step, beside, up_bias, e * outs, kind, gates, first, last, made_F, a_F, laid)
    parts = (width + _CHUNK - 1) // _CHUNK
    for job in prange(count * parts):
        e, first = active_E[job // parts], job % parts * _CHUNK
        r, last = offset_E[e], min(width, first + _CHUNK)
        rows, of, to = offset_E[e + 1] - r, at_a + r * wide_hidden, r * width
        s = place_E[e]
        at, at_scale, then = s * down[3], s * width * down[5], _next(down, active_E, place_E, count, job, parts, _CHUNK)
        span_before(down, at, at_scale, rows_x, of, wide_hidden, rows, room, to, width, first, last, then)
        for m in range(r, r + rows):
            _weigh(room, m * width, down_bias, e * width, wide(weight_R[m]), first, last)
    for part in prange(parts):
        first, last = part * _CHUNK, min(width, (part + 1) * _CHUNK)
        _summed(room, token_R, width, tokens, adds, first, last, out)
    return True
