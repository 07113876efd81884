"""Few tokens, without gradients: the products of a layer in few calls that read the chosen experts' weights once.

A matrix-vector product is a weighted sum of the matrix's rows, and so is one with several matrices of a stack: what
``torch.embedding_bag`` computes over the stack seen as one table. Its kernels read at the speed of memory, in bf16 as
well, where torch's products of few rows take two to five times as long (docs/performance.md). Weights that are stored
(out, in) are no such table: the compiled kernels take them (``turnout.run.compiled``), a layer in one call, and where
numba is missing every expert has a product of its own, without the rest of what ``sort`` prepares.

After a layer's weights went through the caches, Python and torch's dispatcher run from cold memory, so that a call of
either costs several times what it costs in a loop: the fewer, the better.
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from turnout.run.compiled.experts import few_rows, suits_few_rows
from turnout.run.compiled.rows import MOST_ROWS
from turnout.run.product import own_alone, product
from turnout.run.reference import activate
from turnout.run.slots import Slots
from turnout.run.tuned import tuning
from turnout.types import ExpertWeights, Routing

__all__ = ["decode", "decoder", "suits_decoding"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# MKL multiplies a matrix (out, in) by two or three rows in half the time where the matrix is the first factor, and
# short rows up to eight (an AMD Zen 4; docs/performance.md). In 16 bits it is slower.
_TURNED, _TURNED_SHORT, _SHORT = 3, 8, 512


def suits_decoding(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> bool:
    """Whether ``decode`` takes these inputs and is the fastest for them: few tokens on a CPU.

    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> suits_decoding(torch.ones(1, 3), routing, ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 2, 3)))
    True

    Source: none; measured, see docs/performance.md.
    """
    return decoder(x_TD, routing, weights) is not None


def decoder(
    x_TD: Tensor, routing: Routing, weights: ExpertWeights
) -> Callable[[Tensor, Routing, ExpertWeights, Slots | None], Tensor] | None:
    """What ``decode`` runs these inputs by, asked once; None where it does not suit them.

    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> decoder(torch.ones(1, 3, device="meta"), routing, ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 2, 3)))

    Source: none; plain bookkeeping.
    """
    if _compiles(x_TD, routing, weights):
        return few_rows
    up_EDH, entries, here = weights.up_EDH, routing.token_R.shape[0], tuning()
    suits = (
        0 < routing.num_tokens <= here.decode_tokens
        and entries > 0
        and x_TD.device.type == "cpu"
        and x_TD.dtype == up_EDH.dtype == weights.down_EFD.dtype
        and x_TD.dtype in _DTYPES
        and (entries <= here.decode_rows * up_EDH.shape[0] or not up_EDH.is_contiguous())
    )
    return _by_torch if suits else None


def _compiles(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> bool:
    """Whether the compiled kernels take these, and are the fastest for them: weights stored (out, in)."""
    entries, experts = routing.token_R.shape[0], weights.up_EDH.shape[0]
    few = 0 < routing.num_tokens <= MOST_ROWS and 0 < entries <= tuning().compiled_rows * experts
    return few and not weights.up_EDH.is_contiguous() and suits_few_rows(x_TD, routing, weights)


def decode(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """(T, D) each token's weighted sum of its experts' outputs, for inputs that ``suits_decoding``; no gradients.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes, and with what weight.
        weights: the experts; fastest stored (out, in) with the compiled kernels, (in, out) without.

    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> weights = ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 4, 3), activation="relu")
    >>> decode(torch.ones(1, 3), routing, weights)
    tensor([[6., 6., 6.]])

    Source: none; the weighted sum of rows that torch has for embeddings.
    """
    return (few_rows if _compiles(x_TD, routing, weights) else _by_torch)(x_TD, routing, weights, None)


def _by_torch(x_TD: Tensor, routing: Routing, weights: ExpertWeights, slots: Slots | None = None) -> Tensor:
    up_EDH, down_EFD, T, dtype = weights.up_EDH, weights.down_EFD, x_TD.shape[0], x_TD.dtype
    R = routing.token_R.shape[0]
    tables = slots is None and up_EDH.is_contiguous() and down_EFD.is_contiguous()
    biased = weights.up_bias_EH is not None or weights.down_bias_ED is not None
    expert_R = torch.repeat_interleave(routing.offset_E.diff(), output_size=R) if tables or biased else routing.token_R
    spans = [] if tables else _spans(routing)

    def times(stack_EIO: Tensor, row_RI: Tensor) -> Tensor:
        return _bags(stack_EIO, expert_R, row_RI) if tables else _products(stack_EIO, spans, row_RI, slots)

    x_RD = x_TD.expand(R, -1) if T == 1 else x_TD.index_select(0, routing.token_R)
    h_RH = times(up_EDH, x_RD)
    if weights.up_bias_EH is not None:
        h_RH = h_RH.add_(weights.up_bias_EH.index_select(0, expert_R))
    a_RF = activate(h_RH, weights.activation, interleaved=weights.interleaved)
    if T == 1 and tables and not biased:
        # The sum over the experts is one more sum of rows: of all of them, weighted.
        return _bags(down_EFD, expert_R, a_RF.mul_(routing.weight_R.unsqueeze(1)), whole=True)
    y_RD = times(down_EFD, a_RF)
    if weights.down_bias_ED is not None:
        y_RD = y_RD.add_(weights.down_bias_ED.index_select(0, expert_R))
    if T == 1:
        return torch.mm(routing.weight_R.unsqueeze(0).to(dtype), y_RD)
    order_R, start_T = routing.by_token
    weight_R = routing.weight_R.index_select(0, order_R).to(dtype)
    return torch.embedding_bag(y_RD, order_R, start_T, False, 0, False, weight_R, True)[0]


@functools.lru_cache(maxsize=64)
def _count(end: int, step: int = 1) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(0, end, step, device="cpu")


def _bags(stack_EIO: Tensor, expert_R: Tensor, row_RI: Tensor, *, whole: bool = False) -> Tensor:
    """(R, O) each row times the matrix of its expert, or with ``whole`` (1, O) the sum of that."""
    E, inside, outside = stack_EIO.shape
    size = row_RI.numel()
    index_RI = torch.add(_count(inside), expert_R.unsqueeze(1), alpha=inside)
    start_R = _count(size, size if whole else inside)
    table = stack_EIO.view(E * inside, outside)
    return torch.embedding_bag(table, index_RI.view(-1), start_R, False, 0, False, row_RI.reshape(-1))[0]


def _spans(routing: Routing) -> list[tuple[int, int, int]]:
    """Every expert with entries, and where they begin and end."""
    bound = itertools.pairwise(routing.bounds())
    return [(expert, start, end) for expert, (start, end) in enumerate(bound) if start < end]


def _products(
    stack_EIO: Tensor, spans: list[tuple[int, int, int]], row_RI: Tensor, slots: Slots | None = None
) -> Tensor:
    """(R, O) each row times the matrix of its expert."""
    _, inside, outside = stack_EIO.shape
    out_RO, fp32 = row_RI.new_empty(row_RI.shape[0], outside), row_RI.dtype == torch.float32
    turned = (_TURNED_SHORT if inside < _SHORT else _TURNED) if fp32 else 0
    own = own_alone(row_RI.dtype, row_RI.shape[0] * inside * outside)
    for matrix_IO, start, end in _matrices(stack_EIO, spans, slots):
        of_MI = row_RI[start:end]
        if not own:
            product(of_MI, matrix_IO, out_MN=out_RO[start:end])
        elif 1 < end - start <= turned:
            out_RO[start:end].copy_(torch.mm(matrix_IO.t(), of_MI.t()).t())
        else:
            torch.mm(of_MI, matrix_IO, out=out_RO[start:end])
    return out_RO


def _matrices(
    stack_EIO: Tensor, spans: list[tuple[int, int, int]], slots: Slots | None
) -> Iterator[tuple[Tensor, int, int]]:
    """Each expert's matrix and the rows that meet it, in the order of experts."""
    if slots is None:
        yield from ((stack_EIO[expert], start, end) for expert, start, end in spans)
        return
    held = slots.stack(stack_EIO)
    assert isinstance(held, Tensor)
    for place, there in slots.some([expert for expert, _, _ in spans]):
        for slot, (_, start, end) in zip(there, spans[place], strict=True):
            yield held[slot], start, end
