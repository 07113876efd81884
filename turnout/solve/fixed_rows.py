"""Products of rows in tiles of known sizes, so that no row's bits depend on how many rows there are, or on which."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["LINE", "ROWS", "fixed_linear", "fixed_rows", "fixed_tiles"]

# Rows of the tile that all others must agree with: more are a waste for a single row, fewer for many (docs/log.md).
ROWS = 16
# What other tiles may have: fewer for few rows, more for many, where each row has the bits that it has in ``ROWS``.
_FEWER, _MORE = (1, 2, 4, 8), (64, 256)
# So many rows at most, and at least, are drawn to see whether two tiles agree, as many as go with so many products: the
# fewer inputs there are, the likelier do sums in another order agree by chance, and the last output may have its own.
_DRAWS, _LEAST, _PRODUCTS = 64, 3, 1 << 20
# So many numbers are drawn for weights, again and again: a prime, so that no two rows of a matrix are the same.
_RANDOM = 65_537
# Bytes of a line of memory: kernels may ask where in it a matrix begins.
LINE = 64
_known: dict[tuple[object, ...], bool] = {}


def fixed_rows(weight_OI: Tensor, size: int = ROWS) -> bool:
    """Whether a tile of so many rows gives each of them, in every place, the bits that it has in a tile of ``ROWS``.

    That is looked at, once for each shape, place within a line of memory, dtype and number of threads: a tile of equal
    rows must give equal rows, and those of the other tile. Random numbers stand for the weights, which count for
    nothing: with zeros, say, all tiles agree.

    Args:
        weight_OI: (O, I), any strides.
        size: how many rows, at least 1.

    >>> fixed_rows(torch.ones(1, 1), 4)  # of one product no order of sums can differ
    True

    Source: none; a product in which every row meets the same operations.
    """
    lies = weight_OI.shape, weight_OI.stride(), weight_OI.data_ptr() % LINE
    key = (lies, weight_OI.dtype, weight_OI.device, torch.get_num_threads(), size)
    if key not in _known:
        generator = torch.Generator().manual_seed(0)
        draws = min(_DRAWS, max(_LEAST, _PRODUCTS // max(1, weight_OI.numel())))
        row_NI, like_OI = torch.randn(draws, weight_OI.shape[1], generator=generator).to(weight_OI), _like(weight_OI)
        _known[key] = all(_agree(row_I, like_OI, size) for row_I in row_NI)
    return _known[key]


def _like(weight_OI: Tensor) -> Tensor:
    """(O, I) random numbers that lie in memory as the weights do, down to the place within a line."""
    count = 1 + sum(max(0, size - 1) * step for size, step in zip(weight_OI.shape, weight_OI.stride(), strict=True))
    room_N = weight_OI.new_empty(count + LINE)
    before = (weight_OI.data_ptr() - room_N.data_ptr()) % LINE // weight_OI.element_size()
    some_P = torch.randn(min(len(room_N), _RANDOM), generator=torch.Generator().manual_seed(1)).to(weight_OI)
    for part_P in room_N.split(_RANDOM):
        part_P.copy_(some_P[: len(part_P)])
    return room_N.as_strided(weight_OI.shape, weight_OI.stride(), before)


def _agree(row_I: Tensor, weight_OI: Tensor, size: int) -> bool:
    out_NO = torch.mm(row_I.expand(ROWS, -1).contiguous(), weight_OI.t())
    same = bool((out_NO == out_NO[:1]).all())
    if same and size != ROWS:
        same = bool((torch.mm(row_I.expand(size, -1).contiguous(), weight_OI.t()) == out_NO[:1]).all())
    return same


def fixed_tiles(count: int, suits: Callable[[int], bool]) -> Iterator[tuple[int, int, int]]:
    """(first, last, size) of tiles that hold so many rows, the last of them perhaps not full.

    Args:
        count: how many rows.
        suits: whether tiles of so many rows may be taken; where not even ``ROWS`` is, each row is one.

    >>> list(fixed_tiles(90, lambda size: size >= 8))
    [(0, 64, 64), (64, 80, 16), (80, 90, 16)]
    >>> list(fixed_tiles(5, lambda size: size >= 8))
    [(0, 5, 8)]

    Source: none; whole tiles, the largest first.
    """
    if not suits(ROWS):
        yield from ((row, row + 1, 1) for row in range(count))
        return
    start = 0
    for size in (*reversed(_MORE), ROWS):
        while count - start >= size and suits(size):
            yield start, start + size, size
            start += size
    if left := count - start:
        yield start, count, next((size for size in _FEWER if size >= left and suits(size)), ROWS)


def fixed_linear(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """(M, O) x W^T + b, computed so many rows at a time, in memory of its own; no gradients.

    Args:
        x_MI: the rows.
        weight_OI: in the same dtype.
        bias_O: (O,) or None.

    >>> fixed_linear(torch.ones(3, 2), torch.ones(4, 2))[2]
    tensor([2., 2., 2., 2.])

    Source: He, 2025, "Defeating Nondeterminism in LLM Inference" (Thinking Machines Lab).
    """
    (count, inner), outer = x_MI.shape, weight_OI.shape[0]
    out_MO = x_MI.new_empty(count, outer)
    suits = functools.cache(lambda size: fixed_rows(weight_OI, size))
    for first, last, size in fixed_tiles(count, suits):
        tile_NI = x_MI.new_zeros(size, inner)
        tile_NI[: last - first] = x_MI[first:last]
        out_MO[first:last] = torch.mm(tile_NI, weight_OI.t())[: last - first]
    return out_MO if bias_O is None else out_MO.add_(bias_O)
