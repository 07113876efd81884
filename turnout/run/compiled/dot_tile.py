"""Sums of products of some rows with some outputs, both as they lie: the inside of ``turnout.run.compiled.dots``.

The tile holds rows times outputs in registers, each a vector of partial sums, which are added up at the end. Nothing is
packed or turned beforehand, as products of torch do for each matrix: with a hundred rows for each, that shows. In
bfloat16 the processor's own product of pairs is taken, which sums in float32.
"""

import importlib
from typing import Any

from turnout.run.compiled.engine import Lazy

__all__ = ["BFLOAT", "OUTS", "ROWS", "dot_tile", "dot_tile_1"]

# Of the larger tile: 16 vectors of sums, beside four of the rows, in 32 registers.
ROWS = 4
OUTS = 4
_LANES = 16


class _Tile:
    """Writes one tile in LLVM's vectors."""

    def __init__(self, context: Any, builder: Any, signature: Any, given: Any, rows: int) -> None:
        self.tools, types = importlib.import_module("numba.core.cgutils"), importlib.import_module("numba").types
        self.ir, self.builder, self.rows = self.tools.ir, builder, rows
        x, self.at_x, self.stride_x, w, self.at_w, out, self.at_out, self.stride_out, self.ins = given
        kinds = signature.args
        self.x, self.w, self.out = (
            context.make_array(kinds[place])(context, builder, value).data
            for place, value in ((0, x), (3, w), (5, out))
        )
        self.real, self.long, self.word = self.ir.FloatType(), self.ir.IntType(32), self.ir.IntType(64)
        self.vector = self.ir.VectorType(self.real, _LANES)
        self.short = kinds[0].dtype == types.uint16
        self.step = 2 * _LANES if self.short else _LANES

    def write(self) -> None:
        """The sums over all inputs, and where they go."""
        builder, tools, count = self.builder, self.tools, self.rows * OUTS
        builder.function.attributes.add("noinline")  # long, and called from several places
        sums = [tools.alloca_once(builder, self.vector) for _ in range(count)]
        for each in sums:
            builder.store(self.vector([0.0] * _LANES), each)
        rows = [builder.add(self.at_x, builder.mul(self.stride_x, self.word(row))) for row in range(self.rows)]
        outs = [builder.add(self.at_w, builder.mul(self.ins, self.word(out))) for out in range(OUTS)]
        with tools.for_range(builder, builder.udiv(self.ins, self.word(self.step))) as loop:
            at = builder.mul(loop.index, self.word(self.step))
            x = [self._load(self.x, builder.add(row, at)) for row in rows]
            for out, start in enumerate(outs):
                w = self._load(self.w, builder.add(start, at))
                for row in range(self.rows):
                    into = sums[row * OUTS + out]
                    builder.store(self._plus(builder.load(into), w, x[row]), into)
        added = self._added([builder.load(each) for each in sums])
        for row in range(self.rows):
            which = self.ir.VectorType(self.long, OUTS)([row * OUTS + out for out in range(OUTS)])
            self._store(builder.shuffle_vector(added, added, which), row)

    def _load(self, pointer: Any, at: Any) -> Any:
        kind = self.vector if not self.short else self.ir.VectorType(BFLOAT.made(), 2 * _LANES)
        place = self.builder.bitcast(self.builder.gep(pointer, [at]), kind.as_pointer())
        return self.builder.load(place, align=1)

    def _plus(self, total: Any, a: Any, b: Any) -> Any:
        name = "llvm.x86.avx512bf16.dpbf16ps.512" if self.short else f"llvm.fma.v{_LANES}f32"
        given = [total, a, b] if self.short else [a, b, total]
        kind = self.ir.FunctionType(self.vector, [each.type for each in given])
        return self.builder.call(self.tools.get_or_insert_function(self.builder.module, kind, name), given)

    def _store(self, some: Any, row: int) -> None:
        builder = self.builder
        at = builder.add(self.at_out, builder.mul(self.stride_out, self.word(row)))
        if self.short:
            some = builder.fptrunc(some, self.ir.VectorType(BFLOAT.made(), OUTS))
        place = builder.bitcast(builder.gep(self.out, [at]), some.type.as_pointer())
        builder.store(some, place, align=1)

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
            vectors = [halves(low, high, 2 * parts, _LANES // parts) for low, high in pairs]
            parts *= 2
        (vector,), length = vectors, _LANES // parts
        while length > 1:
            vector, length = halves(vector, vector, parts, length), length // 2
        return vector


def _bfloat() -> Any:
    ir = importlib.import_module("numba.core.cgutils").ir

    class Bfloat(ir.types.Type):
        """LLVM's bfloat, which llvmlite does not name."""

        intrinsic_name = "bf16"

        def _to_string(self) -> str:
            return "bfloat"

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Bfloat)

        def __hash__(self) -> int:
            return hash("bfloat")

    return Bfloat()


BFLOAT = Lazy(_bfloat)


def _tile(rows: int) -> Any:
    types = importlib.import_module("numba").types

    @importlib.import_module("numba.extending").intrinsic
    def tile(context, x, at_x, stride_x, w, at_w, out, at_out, stride_out, ins):
        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            _Tile(context, builder, signature, given, rows).write()
            return context.get_dummy_value()

        n = types.intp
        return types.void(x, n, n, w, n, out, n, n, n), lower

    return tile


# dot_tile(x, at_x, stride_x, w, at_w, out, at_out, stride_out, ins): of ROWS rows, or of one, with OUTS outputs, whose
# weights lie one after the other; ins is a multiple of 16, in bfloat16 of 32.
dot_tile: Any = Lazy(lambda: _tile(ROWS))
dot_tile_1: Any = Lazy(lambda: _tile(1))
