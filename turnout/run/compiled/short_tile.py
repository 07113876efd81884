"""The inner loop where rows are bfloat16: the processor multiplies pairs of them, and sums in float32.

Nothing is widened. Weights in bfloat16 are multiplied as they lie. Of 64 whole numbers in a line of memory the upper
and lower bytes of their bfloat16, which is exact, are looked up by their absolute values, and put together to words;
four bits are looked up as they are, 32 at a time, in every fourth number of 128. Rows are laid out to meet them so
(``turnout.run.compiled.order``). Sums over a line are multiplied by the scales of its lanes.

The product of pairs takes numbers below 2^-126 for 0, before and after.

Source: Intel, 2024, "Architecture Instruction Set Extensions Programming Reference", VDPBF16PS, VPERMI2B, VPERMW.
"""

import struct
from typing import Any

import torch

from turnout.run.compiled.tile import Tile
from turnout.run.compiled.vectors import bfloat

__all__ = ["NEEDS", "ShortTile"]

# What a processor needs for codes of a dtype, in LLVM's words.
_PAIRS = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512bf16"})
NEEDS = {torch.bfloat16: _PAIRS, torch.uint8: _PAIRS, torch.int8: _PAIRS | {"avx512vbmi"}}
_LINE = 64


def _brain(number: float) -> int:
    """The bits of a number that bfloat16 has."""
    return struct.unpack("<I", struct.pack("<f", number))[0] >> 16


class ShortTile(Tile):
    """Writes one tile: for each output sums over lines of codes, the last of which may not be full."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        ir = self.ir
        self.pairs = ir.VectorType(bfloat(), 32)
        self.half = ir.IntType(16)
        self.line = _LINE * 8 // self.kind.bitwidth * (2 if self.halved else 1)
        # Registers hold the sums of these and what a line of each becomes.
        self.together = {1: 4, 2: 4, 4: 2 if self.scaled else 4, 8: 2}[self.rows]
        if self.halved:
            self.words = self._words()

    def _table(self) -> list[Any]:
        return []

    def _words(self) -> Any:
        """The 16 levels as bfloat16, twice: places are told by five bits, the last of which is another number's."""
        ir, builder = self.ir, self.builder
        levels = builder.bitcast(self._load(self.levels, self.word(0), self.vector), ir.VectorType(self.long, 16))
        upper = builder.trunc(builder.lshr(levels, levels.type([16] * 16)), ir.VectorType(self.half, 16))
        return builder.shuffle_vector(upper, upper, ir.VectorType(self.long, 32)([i % 16 for i in range(32)]))

    def _call(self, name: str, kind: Any, *given: Any) -> Any:
        function = self.ir.FunctionType(kind, [each.type for each in given])
        return self.builder.call(self.tools.get_or_insert_function(self.builder.module, function, name), given)

    def _shorts(self, at: Any, left: Any) -> list[Any]:
        """The vectors of bfloat16 that a line of codes at this place stands for."""
        ir, builder = self.ir, self.builder
        words = ir.VectorType(self.half, 32)
        if self.kind == self.types.int8:
            return self._of_bytes(self._some(self.code, at, ir.VectorType(ir.IntType(8), _LINE), left))
        if not self.halved:
            return [builder.bitcast(self._some(self.code, at, words, left), self.pairs)]
        left = None if left is None else builder.lshr(left, self.word(1))
        line = builder.bitcast(self._some(self.code, at, ir.VectorType(ir.IntType(8), _LINE), left), words)
        places = [line] + [builder.lshr(line, words([shift] * 32)) for shift in (4, 8, 12)]
        name = "llvm.x86.avx512.permvar.hi.512"
        return [builder.bitcast(self._call(name, words, self.words, each), self.pairs) for each in places]

    def _of_bytes(self, line: Any) -> list[Any]:
        """Of whole numbers from -128 to 127; 128 has the place of 0, which is 0 in both bytes."""
        builder, kind = self.builder, line.type
        far = self._call(f"llvm.abs.v{_LINE}i8", kind, line, self.ir.IntType(1)(0))
        codes = [_brain(number or 128) for number in range(128)]

        def looked_up(table: list[int]) -> Any:
            low, high = kind(table[:_LINE]), kind(table[_LINE:])
            return self._call("llvm.x86.avx512.vpermi2var.qi.512", kind, low, far, high)

        some = builder.icmp_unsigned("!=", line, kind([0] * _LINE))
        upper = builder.select(some, looked_up([code >> 8 for code in codes]), kind([0] * _LINE))
        upper = builder.or_(upper, builder.and_(line, kind([0x80] * _LINE)))
        lower = looked_up([code & 0xFF for code in codes])
        longs = self.ir.VectorType(self.long, _LINE)
        made = []
        for begin in (0, 8):
            first = [16 * lane + begin + i for lane in range(4) for i in range(8)]
            both = longs([place for each in first for place in (each, _LINE + each)])
            made.append(builder.bitcast(builder.shuffle_vector(lower, upper, both), self.pairs))
        return made

    def _pairs(self, a: Any, b: Any, into: Any) -> Any:
        return self._call("llvm.x86.avx512bf16.dpbf16ps.512", self.vector, into, a, b)

    # ---- the loops

    def _made(self, outs: list[Any]) -> list[list[Any]]:
        builder = self.builder
        codes = [builder.add(self.at, builder.mul(out, self.stride)) for out in outs]
        scales = [builder.add(self.at_scale, builder.mul(out, self.groups)) for out in outs]
        ahead = builder.add(self.then, builder.sub(codes[0], self.at))
        sums = self._zeros()
        if not self.scaled:
            self._lines(codes, ahead, self.word(0), self.group, sums)
            return [[builder.load(row) for row in rows] for rows in sums]
        with builder.if_else(builder.icmp_signed("==", self.groups, self.word(1))) as (alone, parted):
            with alone:
                self._lines(codes, ahead, self.word(0), self.group, sums)
                for scale, rows in zip(scales, sums, strict=True):
                    factor = self._scale(scale)
                    for each in rows:
                        builder.store(builder.fmul(builder.load(each), factor), each)
            with parted:
                self._groups(codes, scales, ahead, sums)
        return [[builder.load(row) for row in rows] for rows in sums]

    def _groups(self, codes: list[Any], scales: list[Any], ahead: Any, sums: list[list[Any]]) -> None:
        """As many groups at a time as a vector holds scales; together they are whole lines, but for the last ones."""
        builder, many = self.builder, self.word(self.lanes)
        parts = builder.udiv(builder.add(self.groups, self.word(self.lanes - 1)), many)
        inverse = builder.fdiv(self.real(1.0), builder.sitofp(self.group, self.real))
        with self.tools.for_range(builder, parts) as loop:
            first = builder.mul(loop.index, many)
            left = builder.sub(self.groups, first)
            left = builder.select(builder.icmp_signed("<", left, many), left, many)
            factors = [self._scales(builder.add(scale, first), left) for scale in scales]
            begin, count = builder.mul(first, self.group), builder.mul(left, self.group)
            self._lines(codes, ahead, begin, count, sums, factors, self._splat(inverse, self.lanes))

    def _lines(
        self,
        codes: list[Any],
        ahead: Any,
        begin: Any,
        count: Any,
        sums: list[list[Any]],
        factors: list[Any] | None = None,
        inverse: Any = None,
    ) -> None:
        """The lines of ``count`` inputs, each with the scales of its lanes or without."""
        builder, size = self.builder, self.word(self.line)
        lines, left = builder.udiv(count, size), builder.urem(count, size)
        middles = self.tools.alloca_once(builder, self.vector)
        builder.store(self.vector([at + 0.5 for at in self._begins()]), middles)

        def line(at: Any, left: Any = None) -> None:
            here = None
            if factors is not None:  # each lane's place among the groups, and so its scale
                middle = builder.load(middles)
                group = builder.fptosi(builder.fmul(middle, inverse), self.ir.VectorType(self.long, self.lanes))
                name = "llvm.x86.avx512.permvar.sf.512"
                here = [self._call(name, self.vector, factor, group) for factor in factors]
                builder.store(builder.fadd(middle, self.vector([float(self.line)] * self.lanes)), middles)
            self._add_line(codes, here, builder.add(begin, at), sums, left)

        with self.tools.for_range(builder, lines) as loop:
            at = builder.mul(loop.index, size)
            passed = builder.mul(self._of(builder.add(begin, at)), self.word(self.together))
            self._fetch(builder.add(ahead, passed))
            line(at)
        with builder.if_then(builder.icmp_signed(">", left, self.word(0)), likely=False):
            line(builder.mul(lines, size), left)

    def _begins(self) -> list[int]:
        """The first input of a line that each lane sums."""
        return [8 * lane if self.halved else 16 * (lane // 4) for lane in range(self.lanes)]

    def _of(self, at: Any) -> Any:
        """Where the code of input ``at`` lies."""
        return self.builder.lshr(at, self.word(1)) if self.halved else at

    def _bytes(self, codes: int) -> int:
        return _LINE  # a line of each output is fetched at once

    def _add_line(
        self, codes: list[Any], factors: list[Any] | None, at: Any, sums: list[list[Any]], left: Any = None
    ) -> None:
        builder = self.builder
        weights = [self._shorts(builder.add(code, self._of(at)), left) for code in codes]
        for row in range(self.rows):
            rows = [each[row] for each in sums]
            totals = [builder.load(into) if factors is None else self.vector([0.0] * self.lanes) for into in rows]
            start = builder.add(builder.add(self.at_x, builder.mul(self.stride_x, self.word(row))), at)
            for part, some in enumerate(zip(*weights, strict=True)):
                x = self._load(self.x, builder.add(start, self.word(32 * part)), self.pairs)
                totals = [self._pairs(weight, x, total) for weight, total in zip(some, totals, strict=True)]
            if factors is not None:
                given = zip(totals, factors, rows, strict=True)
                totals = [self._fused(total, factor, builder.load(into)) for total, factor, into in given]
            for total, into in zip(totals, rows, strict=True):
                builder.store(total, into)

    # ---- scales

    def _scales(self, at: Any, left: Any) -> Any:
        """The scales there, of which so many are left, in float32."""
        types, ir = self.types, self.ir
        kinds = {types.float32: self.real, types.int16: ir.HalfType(), types.uint16: self.half}
        element = kinds.get(self.scale_kind, ir.IntType(8))
        return self._widened(self._some(self.scale, at, ir.VectorType(element, self.lanes), left))

    def _widened(self, some: Any) -> Any:
        """As ``turnout.run.compiled.lanes.widened``, of a vector."""
        types, builder, kind = self.types, self.builder, self.scale_kind
        if kind == types.float32:
            return some
        if kind == types.int16:
            return builder.fpext(some, self.vector)
        longs = self.ir.VectorType(self.long, self.lanes)
        bits = builder.zext(some, longs)
        if kind == types.uint16:
            return builder.bitcast(builder.shl(bits, longs([16] * self.lanes)), self.vector)
        power = builder.shl(bits, longs([23] * self.lanes))
        least = builder.icmp_unsigned("==", power, longs([0] * self.lanes))
        return builder.bitcast(builder.select(least, longs([1 << 22] * self.lanes), power), self.vector)
