"""Sums over rows of one number each times a whole row: the inside of ``turnout.run.compiled.broads``.

The tile holds rows times four vectors of columns in registers; each number of the first factor meets all columns. In
bfloat16 a word holds two numbers that follow each other in the sum, in both factors, as the processor's own product of
pairs wants them.
"""

import importlib
from typing import Any

from turnout.run.compiled.dot_tile import BFLOAT
from turnout.run.compiled.engine import Lazy

__all__ = ["COLUMNS", "ROWS", "broad_tile", "broad_tile_1", "lay_columns"]

# 24 vectors of sums, beside four of columns and one number, in 32 registers.
ROWS = 6
_VECTORS = 4
_LANES = 16
COLUMNS = _VECTORS * _LANES


class _Tile:
    """Writes one tile in LLVM's vectors."""

    def __init__(self, context: Any, builder: Any, signature: Any, given: Any, rows: int) -> None:
        self.tools, types = importlib.import_module("numba.core.cgutils"), importlib.import_module("numba").types
        self.ir, self.builder, self.rows = self.tools.ir, builder, rows
        a, self.at_a, self.stride_a, self.next_a, b, self.at_b, self.count, out, self.at_out, self.stride_out = given
        kinds = signature.args
        self.a, self.b, self.out = (
            context.make_array(kinds[place])(context, builder, value).data
            for place, value in ((0, a), (4, b), (7, out))
        )
        self.real, self.long, self.word = self.ir.FloatType(), self.ir.IntType(32), self.ir.IntType(64)
        self.vector = self.ir.VectorType(self.real, _LANES)
        self.short = kinds[7].dtype == types.uint16

    def write(self) -> None:
        """The sums over all words, and where they go."""
        builder, tools = self.builder, self.tools
        builder.function.attributes.add("noinline")  # long, and called from several places
        sums = [[tools.alloca_once(builder, self.vector) for _ in range(_VECTORS)] for _ in range(self.rows)]
        for each in (one for row in sums for one in row):
            builder.store(self.vector([0.0] * _LANES), each)
        starts = [builder.add(self.at_a, builder.mul(self.stride_a, self.word(row))) for row in range(self.rows)]
        with tools.for_range(builder, self.count) as loop:
            at = builder.add(self.at_b, builder.mul(loop.index, self.word(COLUMNS)))
            b = [self._load(self.b, builder.add(at, self.word(v * _LANES)), self.vector) for v in range(_VECTORS)]
            along = builder.mul(loop.index, self.next_a)
            for row, start in zip(sums, starts, strict=True):
                one = self._everywhere(self._load(self.a, builder.add(start, along), self.real))
                for into, columns in zip(row, b, strict=True):
                    builder.store(self._plus(builder.load(into), one, columns), into)
        for place, row in enumerate(sums):
            at = builder.add(self.at_out, builder.mul(self.stride_out, self.word(place)))
            for v, each in enumerate(row):
                self._store(builder.load(each), builder.add(at, self.word(v * _LANES)))

    def _load(self, pointer: Any, at: Any, kind: Any) -> Any:
        place = self.builder.bitcast(self.builder.gep(pointer, [at]), kind.as_pointer())
        return self.builder.load(place, align=1)

    def _everywhere(self, one: Any) -> Any:
        nothing = self.vector(self.ir.Undefined)
        some = self.builder.insert_element(nothing, one, self.long(0))
        return self.builder.shuffle_vector(some, nothing, self.ir.VectorType(self.long, _LANES)([0] * _LANES))

    def _plus(self, total: Any, a: Any, b: Any) -> Any:
        given, name = [a, b, total], f"llvm.fma.v{_LANES}f32"
        if self.short:
            pairs = self.ir.VectorType(BFLOAT.made(), 2 * _LANES)
            given = [total, *(self.builder.bitcast(each, pairs) for each in (a, b))]
            name = "llvm.x86.avx512bf16.dpbf16ps.512"
        kind = self.ir.FunctionType(self.vector, [each.type for each in given])
        return self.builder.call(self.tools.get_or_insert_function(self.builder.module, kind, name), given)

    def _store(self, some: Any, at: Any) -> None:
        builder = self.builder
        if self.short:
            some = builder.fptrunc(some, self.ir.VectorType(BFLOAT.made(), _LANES))
        builder.store(some, builder.bitcast(builder.gep(self.out, [at]), some.type.as_pointer()), align=1)


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
            longs = ir.VectorType(ir.IntType(32), _LANES)
            halves = ir.VectorType(ir.IntType(16), _LANES)

            def place(data: Any, at: Any, v: int, vector: Any) -> Any:
                there = builder.gep(data, [builder.add(at, word(v * _LANES))])
                return builder.bitcast(there, vector.as_pointer())

            for v in range(_VECTORS):
                if short:
                    low, high = (builder.load(place(source, at, v, halves), align=1) for at in (at_low, at_high))
                    high = builder.shl(builder.zext(high, longs), longs([16] * _LANES))
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
