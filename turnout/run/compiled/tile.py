"""The one inner loop: outputs of a matrix in any format, one after the other, with 1, 2, 4 or 8 rows of numbers.

It is written in LLVM's own vectors, so that neither the width nor the order of sums is left to a compiler: a row
has the same bits on one thread and on several, alone and among others. Several outputs are made at once, so that rows
are read once for them and enough sums are under way. Two streams of memory at once are read at less than two thirds of
the speed of one (AMD Zen 4): so while some outputs are made, what the next ones need is fetched in the order of memory.
The sums of several outputs, each spread over a vector, are added up together at the end.

A block is two vectors' worth of inputs. Of formats that put two numbers in one word, neighbours i and i + 1 part: the
first vector has those of even place, the second those of odd; the rows that they meet are laid out so
(``turnout.run.compiled.order``), and end with zeros where a block is not full.
"""

import importlib
from typing import Any

from turnout.run.compiled.fetch import LINE, write_fetch
from turnout.run.compiled.lanes import LANES, features, widened

__all__ = ["OUTS", "Tile"]

# As many outputs as a tile makes.
OUTS = 4
# Bytes of a tile's outputs from which on the first cache does not hold the next ones too; of Zen 4's 32 KiB.
_NEAR = 4096


def _ir() -> Any:
    return importlib.import_module("numba.core.cgutils").ir


def _name(ir: Any, kind: Any) -> str:
    """What LLVM calls a type in the names of its functions."""
    return {ir.FloatType: "f32", ir.HalfType: "f16"}.get(type(kind)) or f"i{kind.width}"


class Tile:
    """Writes one tile: for each output, sums over groups of blocks, the last of which may not be full."""

    def __init__(self, context: Any, builder: Any, signature: Any, given: Any, rows: int) -> None:
        self.types, self.tools = importlib.import_module("numba").types, importlib.import_module("numba.core.cgutils")
        ir, self.context, self.builder, self.rows = _ir(), context, builder, rows
        self.ir, self.lanes = ir, LANES.made()
        self.real, self.long, self.word = ir.FloatType(), ir.IntType(32), ir.IntType(64)
        self.vector = ir.VectorType(self.real, self.lanes)
        code, self.at, self.stride, scale, self.at_scale, *rest = given
        self.groups, self.group, levels, x, self.at_x, self.stride_x, out, self.at_out, *rest = rest
        self.stride_out, self.outs, self.then = rest
        kinds = signature.args
        self.kind, self.scale_kind = kinds[0].dtype, kinds[3].dtype
        self.code, self.scale, self.levels = (
            self._data(kinds[place], value) for place, value in ((0, code), (3, scale), (7, levels))
        )
        self.x, self.out = self._data(kinds[8], x), self._data(kinds[11], out)
        self.scaled = self.kind in (self.types.int8, self.types.uint8)
        self.halved = self.kind == self.types.uint8
        self.table = self._table() if self.halved else []
        # One row of fp32 is nothing but a sweep of the matrix, which is fastest with nothing asked for: in large pages
        # of an AMD Zen 4 1.22 times a sweep's time, and 1.51 with four outputs at once.
        self.swept = rows == 1 and self.lanes == 16 and self.kind == self.types.float32
        self.together, self.near = self._together(), self._is_near()

    def _data(self, kind: Any, value: Any) -> Any:
        return self.context.make_array(kind)(self.context, self.builder, value).data

    def _load(self, pointer: Any, at: Any, kind: Any) -> Any:
        """A number, or a vector of them, that need not lie on any boundary."""
        place = self.builder.bitcast(self.builder.gep(pointer, [at]), kind.as_pointer())
        return self.builder.load(place, align=1)

    def _some(self, pointer: Any, at: Any, kind: Any, left: Any) -> Any:
        """A vector of which the first ``left`` numbers are read, and the others are 0; all of them without ``left``."""
        if left is None:
            return self._load(pointer, at, kind)
        ir, builder, lanes = self.ir, self.builder, kind.count
        places = ir.VectorType(self.long, lanes)(list(range(lanes)))
        mask = builder.icmp_signed("<", places, self._splat(builder.trunc(left, self.long), lanes))
        name = f"llvm.masked.load.v{lanes}{_name(ir, kind.element)}.p0"
        place = builder.bitcast(builder.gep(pointer, [at]), kind.as_pointer())
        nothing = ir.Constant(kind, None)
        function = ir.FunctionType(kind, [place.type, mask.type, kind])
        return builder.call(self.tools.get_or_insert_function(builder.module, function, name), [place, mask, nothing])

    def _splat(self, number: Any, lanes: int) -> Any:
        nothing = self.ir.VectorType(number.type, lanes)(self.ir.Undefined)
        one = self.builder.insert_element(nothing, number, self.long(0))
        return self.builder.shuffle_vector(one, nothing, self.ir.VectorType(self.long, lanes)([0] * lanes))

    def _fused(self, a: Any, b: Any, c: Any) -> Any:
        """A times b plus c, with one rounding where the processor has that."""
        name = "llvm.fmuladd.f32" if a.type == self.real else f"llvm.fmuladd.v{self.lanes}f32"
        kind = self.ir.FunctionType(a.type, [a.type] * 3)
        return self.builder.call(self.tools.get_or_insert_function(self.builder.module, kind, name), [a, b, c])

    def _fetch(self, at: Any) -> None:
        """Asks for the codes at this place, which are read some time later: all that a block of each output has."""
        start = self.builder.bitcast(self.builder.gep(self.code, [at]), self.ir.IntType(8).as_pointer())
        lines = range(0, max(1, self.together * self._bytes(2 * self.lanes)), LINE)
        with self.builder.if_else(self.near) as cases:
            for near, case in zip((True, False), cases, strict=True):
                with case:
                    for line in lines:
                        write_fetch(self.builder, start, self.word(line), near=near)

    def _bytes(self, codes: int) -> int:
        """The memory of so many codes."""
        return codes * self.kind.bitwidth // 8 // (2 if self.halved else 1)

    def _is_near(self) -> Any:
        """Whether what comes goes into the first cache: few bits, of which it has to leave most to the rows."""
        if not self.scaled:
            return self.ir.IntType(1)(0)
        size = self.builder.mul(self.stride, self.word(OUTS * self.kind.bitwidth // 8))
        return self.builder.icmp_signed("<=", size, self.word(_NEAR))

    # ---- what a format is in vectors

    def _table(self) -> list[Any]:
        """The 16 levels, as vectors that are looked up in; none where the processor cannot."""
        if self.lanes == 16:
            return [self._load(self.levels, self.word(0), self.vector)]
        if "avx2" in features():
            return [self._load(self.levels, self.word(half), self.vector) for half in (0, 8)]
        return []

    def _levels_of(self, index: Any, table: list[Any]) -> Any:
        """The levels at a vector of places, of which the lowest four bits count."""
        builder, ir = self.builder, self.ir
        indices = index.type

        def permuted(name: str, given: list[Any]) -> Any:
            kind = ir.FunctionType(self.vector, [each.type for each in given])
            return builder.call(self.tools.get_or_insert_function(builder.module, kind, name), given)

        if len(table) == 1:
            return permuted("llvm.x86.avx512.permvar.sf.512", [table[0], index])
        if len(table) == 2:
            low, high = (permuted("llvm.x86.avx2.permps", [half, index]) for half in table)
            upper = builder.icmp_unsigned(
                "!=", builder.and_(index, indices([8] * self.lanes)), indices([0] * self.lanes)
            )
            return builder.select(upper, high, low)
        made = self.vector(ir.Undefined)
        for lane in range(self.lanes):
            place = builder.zext(
                builder.and_(builder.extract_element(index, self.long(lane)), self.long(15)), self.word
            )
            made = builder.insert_element(made, self._load(self.levels, place, self.real), self.long(lane))
        return made

    def _block(self, at: Any, table: list[Any], left: Any = None) -> tuple[Any, ...]:
        """The two vectors of the block of codes at this place, or of so many codes that are left."""
        builder, ir, types, lanes = self.builder, self.ir, self.types, self.lanes
        longs = ir.VectorType(self.long, lanes)
        if self.halved:
            left = None if left is None else builder.lshr(left, self.word(1))
            both = builder.zext(self._some(self.code, at, ir.VectorType(ir.IntType(8), lanes), left), longs)
            return self._levels_of(both, table), self._levels_of(builder.lshr(both, longs([4] * lanes)), table)
        if self.kind == types.uint16:
            both = builder.bitcast(self._some(self.code, at, ir.VectorType(ir.IntType(16), 2 * lanes), left), longs)
            even, odd = builder.shl(both, longs([16] * lanes)), builder.and_(both, longs([0xFFFF0000] * lanes))
            return builder.bitcast(even, self.vector), builder.bitcast(odd, self.vector)
        elements = {types.float32: self.real, types.int16: ir.HalfType(), types.int8: ir.IntType(8)}
        kind = ir.VectorType(elements[self.kind], lanes)
        first = self._some(self.code, at, kind, left)
        left = None if left is None else builder.sub(left, self.word(lanes))
        both = first, self._some(self.code, builder.add(at, self.word(lanes)), kind, left)
        if self.kind == types.float32:
            return both
        if self.kind == types.int16:
            return tuple(builder.fpext(half, self.vector) for half in both)
        return tuple(builder.sitofp(builder.sext(each, longs), self.vector) for each in both)

    # ---- the loops

    def _together(self) -> int:
        """How many outputs' sums are in registers at once: rows are read once for them, and sums seldom wait."""
        return 1 if self.swept else min(OUTS, (16 if self.lanes == 16 else 8) // self.rows)

    def write(self) -> None:
        """The tile: each output's sums go to the stack as vectors, and there they are added up."""
        builder, tools = self.builder, self.tools
        # Who writes tiles is long: compiled once for all its callers, and its loops, of blocks already, not unrolled.
        for attribute in ("noinline", "optsize"):
            builder.function.attributes.add(attribute)
        vectors = tools.alloca_once(builder, self.ir.ArrayType(self.vector, OUTS * self.rows))
        last = builder.sub(self.outs, self.word(1))
        with tools.for_range(builder, self.word(OUTS // self.together)) as loop:
            first = builder.mul(loop.index, self.word(self.together))
            each = [builder.add(first, self.word(out)) for out in range(self.together)]
            # Where fewer outputs are left, the last one is made again.
            made = self._made([builder.select(builder.icmp_signed("<", out, last), out, last) for out in each])
            for out, rows in zip(each, made, strict=True):
                for row, vector in enumerate(rows):
                    at = builder.add(builder.mul(out, self.word(self.rows)), self.word(row))
                    builder.store(vector, builder.gep(vectors, [self.word(0), at]), align=4)
        sums = []
        for first in range(0, OUTS * self.rows, self.lanes):
            some = range(first, min(first + self.lanes, OUTS * self.rows))
            sums.append(
                self._added([builder.load(builder.gep(vectors, [self.word(0), self.word(at)]), align=4) for at in some])
            )
        with builder.if_else(builder.icmp_signed("==", self.outs, self.word(OUTS))) as (whole, parted):
            with whole:
                self._write_rows(sums)
            with parted:
                for at in range(OUTS * self.rows):
                    which, place = divmod(at, self.lanes)
                    number = builder.extract_element(sums[which], self.long(place))
                    self._write_sum(*divmod(at, self.rows), number, last)

    def _write_rows(self, sums: list[Any]) -> None:
        """Of each row all outputs at once."""
        builder = self.builder
        for row in range(self.rows):
            places = [divmod(out * self.rows + row, self.lanes) for out in range(OUTS)]
            kind = self.ir.VectorType(self.real, OUTS)
            some = kind(self.ir.Undefined)
            if len(sums) <= 2:
                which = self.ir.VectorType(self.long, OUTS)([n * self.lanes + place for n, place in places])
                some = builder.shuffle_vector(sums[0], sums[-1], which)
            else:
                for out, (n, place) in enumerate(places):
                    number = builder.extract_element(sums[n], self.long(place))
                    some = builder.insert_element(some, number, self.long(out))
            at = builder.add(self.at_out, builder.mul(self.stride_out, self.word(row)))
            builder.store(some, builder.bitcast(builder.gep(self.out, [at]), kind.as_pointer()), align=4)

    def _write_sum(self, out: int, row: int, number: Any, last: Any) -> None:
        builder = self.builder
        place = builder.select(builder.icmp_signed("<", self.word(out), last), self.word(out), last)
        at = builder.add(self.at_out, builder.mul(self.stride_out, self.word(row)))
        builder.store(number, builder.gep(self.out, [builder.add(at, place)]))

    def _made(self, outs: list[Any]) -> list[list[Any]]:
        """For each of these outputs and each row the sums, as a vector."""
        builder, tools = self.builder, self.tools
        codes = [builder.add(self.at, builder.mul(out, self.stride)) for out in outs]
        scales = [builder.add(self.at_scale, builder.mul(out, self.groups)) for out in outs]
        sums, totals = self._zeros(), self._zeros()
        size = self.word(2 * self.lanes)
        blocks = builder.udiv(self.group, size)
        left = builder.urem(self.group, size)
        with tools.for_range(builder, self.groups) as groups:
            start = builder.mul(groups.index, self.group)
            splats = [self._scale(builder.add(scale, groups.index)) for scale in scales] if self.scaled else []
            tables = [[builder.fmul(each, scale) for each in self.table] for scale in splats]
            with tools.for_range(builder, blocks) as loop:
                self._add_block(codes, builder.add(start, builder.mul(loop.index, size)), tables, sums)
            with builder.if_then(builder.icmp_signed(">", left, self.word(0)), likely=False):
                self._add_block(codes, builder.add(start, builder.mul(blocks, size)), tables, sums, left)
            if self.scaled and not self.table:  # the levels have no scale in them
                for scale, rows, total in zip(splats, sums, totals, strict=True):
                    self._add_group(scale, rows, total)
        found = totals if self.scaled and not self.table else sums
        return [[builder.load(row) for row in rows] for rows in found]

    def _scale(self, at: Any) -> Any:
        """The scale there, in all places of a vector."""
        number = self.builder.load(self.builder.gep(self.scale, [at]))
        return self._splat(widened(self.builder, number, self.scale_kind), self.lanes)

    def _add_group(self, scale: Any, sums: list[Any], totals: list[Any]) -> None:
        """The sums of a group, times its scale, to the totals; and from here they begin at 0."""
        builder = self.builder
        for part, into in zip(sums, totals, strict=True):
            builder.store(self._fused(builder.load(part), scale, builder.load(into)), into)
            builder.store(self.vector([0.0] * self.lanes), part)

    def _zeros(self) -> list[list[Any]]:
        """For each output and row a sum that begins at 0 here, which LLVM keeps in a register."""

        def zero() -> Any:
            made = self.tools.alloca_once(self.builder, self.vector)
            self.builder.store(self.vector([0.0] * self.lanes), made)
            return made

        return [[zero() for _ in range(self.rows)] for _ in range(self.together)]

    def _add_block(
        self, codes: list[Any], at: Any, tables: list[list[Any]], sums: list[list[Any]], left: Any = None
    ) -> None:
        builder = self.builder
        offset = builder.lshr(at, self.word(1)) if self.halved else at
        tables = tables or [[]] * self.together
        blocks = [
            self._block(builder.add(code, offset), table, left) for code, table in zip(codes, tables, strict=True)
        ]
        if left is None and not self.swept:
            ahead = builder.add(builder.sub(codes[0], self.at), builder.mul(offset, self.word(self.together)))
            self._fetch(builder.add(self.then, ahead))
        for part in range(2):
            place = builder.add(self.at_x, builder.add(at, self.word(part * self.lanes)))
            for row in range(self.rows):
                x = self._load(self.x, builder.add(place, builder.mul(self.stride_x, self.word(row))), self.vector)
                for block, rows in zip(blocks, sums, strict=True):
                    builder.store(self._fused(block[part], x, builder.load(rows[row])), rows[row])

    def _added(self, vectors: list[Any]) -> Any:
        """The sum of each vector's numbers, upper half onto lower until one is left: one vector of all the sums."""
        builder, lanes, parts = self.builder, self.lanes, 1

        def halves(low: Any, high: Any, segments: int, length: int) -> Any:
            starts = [segment * length for segment in range(segments)]
            first = [start + i for start in starts for i in range(length // 2)]
            kind = self.ir.VectorType(self.long, len(first))
            masks = (kind(first), kind([each + length // 2 for each in first]))
            return builder.fadd(*(builder.shuffle_vector(low, high, mask) for mask in masks))

        while len(vectors) > 1:  # two vectors of so many segments become one of twice as many, half as long
            pairs = zip(vectors[0::2], vectors[1::2], strict=True)
            vectors = [halves(low, high, 2 * parts, lanes // parts) for low, high in pairs]
            parts *= 2
        (vector,) = vectors
        length = lanes // parts
        while length > 1:
            vector = halves(vector, vector, parts, length)
            length //= 2
        return vector
