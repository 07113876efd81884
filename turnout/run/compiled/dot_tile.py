"""Sums of products of some rows with some outputs, both as they lie: the inside of ``turnout.run.compiled.dots``.

The tile holds rows times outputs in registers, each a vector of partial sums, which are added up at the end. Nothing is
packed or turned beforehand, as products of torch do for each matrix: with a hundred rows for each, that shows. In
bfloat16 the processor's own product of pairs is taken, which sums in float32.
"""

import importlib
from typing import Any

from turnout.run.compiled.engine import Lazy
from turnout.run.compiled.fetch import write_fetch
from turnout.run.compiled.vectors import WIDE, Vectors

__all__ = ["OUTS", "ROWS", "dot_tile", "dot_tile_1", "dot_tile_2"]

# Of the larger tile: 16 vectors of sums, beside four of the rows, in 32 registers.
ROWS = 4
OUTS = 4


class _Tile(Vectors):
    """Writes one tile."""

    def __init__(self, context: Any, builder: Any, signature: Any, given: Any, rows: int) -> None:
        types, kinds, self.rows = importlib.import_module("numba").types, signature.args, rows
        super().__init__(context, builder, short=kinds[0].dtype == types.uint16)
        x, self.at_x, self.stride_x, w, self.at_w, out, self.at_out, self.stride_out, self.ins, *next_ = given
        then, self.at_then, self.each, self.line = next_
        self.then = self.data(kinds[9], then)
        self.x, self.w, self.out = (self.data(kinds[place], value) for place, value in ((0, x), (3, w), (5, out)))
        self.kind, self.step = (self.pairs, 2 * WIDE) if self.short else (self.vector, WIDE)

    def write(self) -> None:
        """The sums over all inputs, and where they go."""
        builder = self.builder
        builder.function.attributes.add("noinline")  # long, and called from several places
        sums = self.zeros(self.rows * OUTS)
        rows = [builder.add(self.at_x, builder.mul(self.stride_x, self.word(row))) for row in range(self.rows)]
        outs = [builder.add(self.at_w, builder.mul(self.ins, self.word(out))) for out in range(OUTS)]
        with self.tools.for_range(builder, builder.udiv(self.ins, self.word(self.step))) as loop:
            at = builder.mul(loop.index, self.word(self.step))
            self._ahead(loop.index)
            x = [self.load(self.x, builder.add(row, at), self.kind) for row in rows]
            for out, start in enumerate(outs):
                w = self.load(self.w, builder.add(start, at), self.kind)
                for row in range(self.rows):
                    self.add(w, x[row], sums[row * OUTS + out])
        added = self._added([builder.load(each) for each in sums])
        for row in range(self.rows):
            which = self.ir.VectorType(self.long, OUTS)([row * OUTS + out for out in range(OUTS)])
            at = builder.add(self.at_out, builder.mul(self.stride_out, self.word(row)))
            self.store(builder.shuffle_vector(added, added, which), self.out, at)

    def _ahead(self, step: Any) -> None:
        """So many lines of what is used next are fetched in every step: memory works while this is summed."""
        builder = self.builder
        with self.tools.for_range(builder, self.each) as loop:
            line = builder.add(builder.mul(step, self.each), loop.index)
            write_fetch(builder, self.then, builder.add(self.at_then, builder.mul(line, self.line)))

    def _added(self, vectors: list[Any]) -> Any:
        """One vector of each vector's sum: two of so many parts become one of twice as many, half as long."""
        builder, parts = self.builder, 1

        def halves(low: Any, high: Any, segments: int, length: int) -> Any:
            first = [segment * length + i for segment in range(segments) for i in range(length // 2)]
            kind = self.ir.VectorType(self.long, len(first))
            masks = (kind(first), kind([each + length // 2 for each in first]))
            return builder.fadd(*(builder.shuffle_vector(low, high, mask) for mask in masks))

        while len(vectors) > 1:
            pairs = zip(vectors[0::2], vectors[1::2], strict=True)
            vectors = [halves(low, high, 2 * parts, WIDE // parts) for low, high in pairs]
            parts *= 2
        (vector,), length = vectors, WIDE // parts
        while length > 1:
            vector, length = halves(vector, vector, parts, length), length // 2
        return vector


def _tile(rows: int) -> Any:
    types = importlib.import_module("numba").types

    @importlib.import_module("numba.extending").intrinsic
    def tile(context, x, at_x, stride_x, w, at_w, out, at_out, stride_out, ins, then, at_then, each, line):
        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            _Tile(context, builder, signature, given, rows).write()
            return context.get_dummy_value()

        n = types.intp
        return types.void(x, n, n, w, n, out, n, n, n, then, n, n, n), lower

    return tile


# dot_tile(x, at_x, stride_x, w, at_w, out, at_out, stride_out, ins, then, at_then, each, line): of ROWS rows, of one or
# two, with OUTS outputs, whose weights lie one after the other; ins is a multiple of 16, in bfloat16 of 32. In every
# step so many lines of what is used next are fetched, from ``then[at_then]`` on.
dot_tile: Any = Lazy(lambda: _tile(ROWS))
dot_tile_1: Any = Lazy(lambda: _tile(1))
dot_tile_2: Any = Lazy(lambda: _tile(2))
