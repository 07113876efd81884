"""Claim: tiles whose rows are sorted by where they come from start early, and results leave by columns."""

import heapq
import random
import statistics

from turnout.claims.claim import Claim, Row, Values

_LAYERS = 12
_BLOCKS, _TILES, _COLUMNS, _SOURCES = 132, 48, 8, 8  # of a chip; of rows; of the output's columns; ranks
_OWN = range(4, 65, 4)  # thread blocks for the wire that are tried, for every arm
_SATURATED = 20  # thread blocks that fill the wire
_REPORTED = 1 / 1.96


def comet() -> Claim:
    """Rows sorted by source make tiles of the first product ready one by one; by columns the second lets results go.

    The control has rows in the order of tokens, so that a tile waits for all ranks, and tiles of the second product row
    by row, so that no column is whole before the last.

    >>> comet().simulated
    True

    Source: Zhang et al., 2025, "Comet: Fine-grained Computation-communication Overlapping for Mixture-of-Experts".
    """
    over = "an expert layer's time over the longer of chip and wire, median of layers"
    return Claim(
        name="comet",
        statement="Fine-grained overlap, tiles in the order in which their rows come, hides more of the wire.",
        source="Zhang et al., 2025, Comet",
        off="rows in the order of tokens, results row by row",
        switched={"comet": "unsorted", "ratio": "ratio off", "adaptive": "fixed"},
        rows=(
            Row(over, "below", "comet", "unsorted", "rows and results in the order of tokens"),
            Row(
                f"{over}, thread blocks",
                "below",
                "adaptive",
                "fixed",
                "the number that is best for all layers",
                headline=True,
            ),
            Row(over, "below", "comet", "chunks", "the best of 1 to 8 chunks, a kernel each", headline=True),
            Row("time over no overlap", "within", "ratio", "ratio off", "none", bound=_REPORTED, headline=True),
        ),
        measure=_measure,
        seconds=3,
        simulated=True,
        note="The paper measures 1.96 times the speed of a layer against systems with losses of their own (launches, "
        "copies, the host); tiles and wire alone give {ratio:.3f} of the time without overlap",
        limits=(0.0, 20.0),
    )


def _measure(seed: int) -> Values:
    chance = random.Random(f"comet {seed}")
    found: dict[str, list[float]] = {name: [] for name in ("comet", "unsorted", "chunks", "ratio")}
    fixed: dict[int, list[float]] = {own: [] for own in _OWN}
    for _ in range(_LAYERS):
        wire, product = chance.uniform(0.3, 1.5), chance.uniform(0.3, 1.5)  # of one direction, of one product
        bound = max(2 * wire, 2 * product)
        times = {own: _layer(wire, product, own, True, chance) for own in _OWN}
        best = min(times, key=times.__getitem__)
        none = _chunks(wire, product, 1)
        found["comet"].append(times[best] / bound)
        found["unsorted"].append(min(_layer(wire, product, own, False, chance) for own in _OWN) / bound)
        for own in _OWN:
            fixed[own].append(times[own] / bound)
        found["chunks"].append(min(_chunks(wire, product, degree) for degree in (1, 2, 4, 8)) / bound)
        found["ratio"].append(times[best] / none)
    values = {name: statistics.median(each) for name, each in found.items()}
    least = min(statistics.median(each) for each in fixed.values())
    return values | {"adaptive": values["comet"], "fixed": least, "ratio off": 1.0}


def _layer(wire: float, product: float, own: int, ordered: bool, chance: random.Random) -> float:
    """One layer with ``own`` thread blocks on the wire and the others on tiles, in the time of the whole chip's."""
    wire = wire / min(1.0, own / _SATURATED)
    arrive = _arrivals(wire, ordered, chance)
    workers = _BLOCKS - own
    # A product is _TILES x _COLUMNS tiles; each takes one thread block this long.
    each = product * _BLOCKS / (_TILES * _COLUMNS)
    free = [0.0] * workers
    tile_done = []
    for ready in sorted(arrive):
        ends = [_take(free, ready, each) for _ in range(_COLUMNS)]
        tile_done.append(max(ends))
    order = [(row, column) for column in range(_COLUMNS) for row in range(_TILES)]
    order = order if ordered else sorted(order)
    column_done = [0.0] * _COLUMNS
    for row, column in order:
        column_done[column] = max(column_done[column], _take(free, tile_done[row], each))
    sent = max(arrive)  # the wire is free once everything has come
    for done in sorted(column_done):
        sent = max(sent, done) + wire / _COLUMNS
    return sent


def _arrivals(wire: float, ordered: bool, chance: random.Random) -> list[float]:
    """When each tile's rows are there: a rank's own at once, the others' one rank after the other."""
    rows = [source for source in range(_SOURCES) for _ in range(_TILES)]  # _SOURCES rows a tile
    if not ordered:
        chance.shuffle(rows)
    per_tile = [rows[tile * _SOURCES : (tile + 1) * _SOURCES] for tile in range(_TILES)]
    return [max(tile) / (_SOURCES - 1) * wire for tile in per_tile]


def _take(free: list[float], ready: float, seconds: float) -> float:
    """The end of a tile on the thread block that is free first."""
    end = max(heapq.heappop(free), ready) + seconds
    heapq.heappush(free, end)
    return end


def _chunks(wire: float, product: float, degree: int) -> float:
    """Dispatch, both products and combine in so many chunks, as kernels one after the other.

    A kernel is whole waves of tiles; while chunks travel the wire has its thread blocks, which with one chunk it needs
    only when no product runs.
    """
    workers = _BLOCKS - (_SATURATED if degree > 1 else 0)
    each = product * _BLOCKS / (_TILES * _COLUMNS)
    kernel = -(-_TILES * _COLUMNS // (degree * workers)) * each
    come, chip, ends = 0.0, 0.0, []
    for _ in range(degree):
        come += wire / degree
        chip = max(chip, come) + 2 * kernel
        ends.append(chip)
    gone = come
    for end in ends:
        gone = max(gone, end) + wire / degree
    return gone
