"""Sums over rows of one number each times a whole row: the inside of ``turnout.run.compiled.broads``.

The tile holds rows times four vectors of columns in registers; each number of the first factor meets all columns. In
bfloat16 a word holds two numbers that follow each other in the sum, in both factors, as the processor's own product of
pairs wants them.
"""

import importlib
from typing import Any

from turnout.run.compiled.engine import Lazy
from turnout.run.compiled.vectors import WIDE, Vectors

__all__ = ["COLUMNS", "ROWS", "broad_tile", "broad_tile_1", "lay_columns"]

# 24 vectors of sums, beside four of columns and one number, in 32 registers.
ROWS = 6
_VECTORS = 4
COLUMNS = _VECTORS * WIDE


class _Tile(Vectors):
    """Writes one tile."""

    def __init__(self, context: Any, builder: Any, signature: Any, given: Any, rows: int) -> None:
        types, kinds, self.rows = importlib.import_module("numba").types, signature.args, rows
        super().__init__(context, builder, short=kinds[4].dtype != types.float32)
        self.narrow = kinds[7].dtype == types.uint16
        a, self.at_a, self.stride_a, self.next_a, b, self.at_b, self.count, out, self.at_out, self.stride_out = given
        self.a, self.b, self.out = (self.data(kinds[place], value) for place, value in ((0, a), (4, b), (7, out)))

    def write(self) -> None:
        """The sums over all words, and where they go."""
        builder = self.builder
        builder.function.attributes.add("noinline")  # long, and called from several places
        sums = [self.zeros(_VECTORS) for _ in range(self.rows)]
        starts = [builder.add(self.at_a, builder.mul(self.stride_a, self.word(row))) for row in range(self.rows)]
        with self.tools.for_range(builder, self.count) as loop:
            at = builder.add(self.at_b, builder.mul(loop.index, self.word(COLUMNS)))
            b = [self.load(self.b, builder.add(at, self.word(v * WIDE)), self.vector) for v in range(_VECTORS)]
            along = builder.mul(loop.index, self.next_a)
            for row, start in zip(sums, starts, strict=True):
                one = self._everywhere(self.load(self.a, builder.add(start, along), self.real))
                for into, columns in zip(row, b, strict=True):
                    self.add(one, columns, into)
        for place, row in enumerate(sums):
            at = builder.add(self.at_out, builder.mul(self.stride_out, self.word(place)))
            for v, each in enumerate(row):
                self.store(builder.load(each), self.out, builder.add(at, self.word(v * WIDE)), narrow=self.narrow)

    def _everywhere(self, one: Any) -> Any:
        nothing = self.vector(self.ir.Undefined)
        some = self.builder.insert_element(nothing, one, self.long(0))
        return self.builder.shuffle_vector(some, nothing, self.ir.VectorType(self.long, WIDE)([0] * WIDE))


def _tile(rows: int) -> Any:
    types = importlib.import_module("numba").types

    @importlib.import_module("numba.extending").intrinsic
    def tile(context, a, at_a, stride_a, next_a, b, at_b, count, out, at_out, stride_out):
        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            _Tile(context, builder, signature, given, rows).write()
            return context.get_dummy_value()

        n = types.intp
        return types.void(a, n, n, n, b, n, n, out, n, n), lower

    return tile


def _lay() -> Any:
    types, tools = importlib.import_module("numba").types, importlib.import_module("numba.core.cgutils")

    @importlib.import_module("numba.extending").intrinsic
    def lay(context, b, at_low, at_high, room, to):
        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            ir, (kind, *_) = tools.ir, signature.args
            b, at_low, at_high, room, to = given
            source, target = (
                context.make_array(signature.args[place])(context, builder, value).data
                for place, value in ((0, b), (3, room))
            )
            short, word = kind.dtype == types.uint16, ir.IntType(64)
            longs = ir.VectorType(ir.IntType(32), WIDE)
            halves = ir.VectorType(ir.IntType(16), WIDE)

            def place(data: Any, at: Any, v: int, vector: Any) -> Any:
                there = builder.gep(data, [builder.add(at, word(v * WIDE))])
                return builder.bitcast(there, vector.as_pointer())

            for v in range(_VECTORS):
                if short:
                    low, high = (builder.load(place(source, at, v, halves), align=1) for at in (at_low, at_high))
                    high = builder.shl(builder.zext(high, longs), longs([16] * WIDE))
                    both = builder.or_(builder.zext(low, longs), high)
                else:
                    both = builder.load(place(source, at_low, v, longs), align=1)
                builder.store(both, place(target, to, v, longs), align=1)
            return context.get_dummy_value()

        n = types.intp
        return types.void(b, n, n, room, n), lower

    return lay


# lay_columns(b, at_low, at_high, room, to): COLUMNS numbers of b as words of room; of 16 bits those of two rows in one.
lay_columns: Any = Lazy(_lay)
# broad_tile(a, at_a, stride_a, next_a, b, at_b, count, out, at_out, stride_out): COLUMNS columns of ROWS rows, or of
# one: the sums over ``count`` words a[at_a + stride_a row + next_a k] times b[at_b + COLUMNS k + column].
broad_tile: Any = Lazy(lambda: _tile(ROWS))
broad_tile_1: Any = Lazy(lambda: _tile(1))
