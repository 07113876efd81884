"""A row of codes in few bits written out as numbers: the inside of ``turnout.run.compiled.panels``.

A number is what ``turnout.types.Packed.dequantised`` makes of its code: value times scale in float32, rounded once to
what is written. In bfloat16 sixteen levels are multiplied by their scale, and rounded, once a group, and 32 codes then
take their numbers from that table by one word of the processor's.
"""

import importlib
from typing import Any

from turnout.run.compiled.engine import Lazy
from turnout.run.compiled.lanes import widened
from turnout.run.compiled.vectors import WIDE, Vectors

__all__ = ["unpack"]

_LEVELS = 16


class _Row(Vectors):
    """Writes what writes a row out."""

    def __init__(self, context: Any, builder: Any, signature: Any, given: Any) -> None:
        types, kinds = importlib.import_module("numba").types, signature.args
        super().__init__(context, builder, short=kinds[7].dtype == types.uint16)
        code, self.at, scale, self.at_scale, self.groups, self.group, levels, room, self.to = given
        self.code, self.scale, self.levels, self.room = (
            self.data(kinds[place], value) for place, value in ((0, code), (2, scale), (6, levels), (7, room))
        )
        self.scale_kind, self.halved = kinds[2].dtype, kinds[0].dtype == types.uint8

    def write(self) -> None:
        """Groups, and blocks of 32 codes in them."""
        builder, block = self.builder, self.word(2 * WIDE)
        builder.function.attributes.add("noinline")  # long, and called from several places
        table = self.load(self.levels, self.word(0), self.vector) if self.halved else None
        with self.tools.for_range(builder, self.groups) as groups:
            start = builder.mul(groups.index, self.group)
            one = builder.load(builder.gep(self.scale, [builder.add(self.at_scale, groups.index)]))
            scale = self._everywhere(widened(builder, one, self.scale_kind))
            scaled = None if table is None else self._scaled(table, scale)
            with self.tools.for_range(builder, builder.udiv(self.group, block)) as blocks:
                at = builder.add(start, builder.mul(blocks.index, block))
                codes = builder.add(self.at, builder.lshr(at, self.word(1)) if self.halved else at)
                made = self._whole(codes, scale) if scaled is None else self._looked_up(codes, scaled)
                place = builder.gep(self.room, [builder.add(self.to, at)])
                builder.store(made, builder.bitcast(place, made.type.as_pointer()), align=1)

    def _kind(self, of: Any, count: int) -> Any:
        return self.ir.VectorType(of, count)

    def _mask(self, places: list[int]) -> Any:
        return self._kind(self.long, len(places))(places)

    def _everywhere(self, one: Any) -> Any:
        nothing = self.vector(self.ir.Undefined)
        some = self.builder.insert_element(nothing, one, self.long(0))
        return self.builder.shuffle_vector(some, nothing, self._mask([0] * WIDE))

    def _rounded(self, both: Any) -> Any:
        """Thirty-two numbers as they are written."""
        return self.builder.fptrunc(both, self.pairs) if self.short else both

    def _whole(self, at: Any, scale: Any) -> Any:
        """Thirty-two whole numbers times their scale."""
        builder, halves = self.builder, []
        for half in range(2):
            codes = self.load(self.code, builder.add(at, self.word(half * WIDE)), self._kind(self.ir.IntType(8), WIDE))
            value = builder.sitofp(builder.sext(codes, self._kind(self.long, WIDE)), self.vector)
            halves.append(builder.fmul(value, scale))
        return self._rounded(builder.shuffle_vector(*halves, self._mask([*range(2 * WIDE)])))

    def _scaled(self, table: Any, scale: Any) -> Any:
        """The sixteen levels times the scale; to be looked up as 16 bits twice over, so that a fifth bit is none."""
        scaled = self.builder.fmul(table, scale)
        if not self.short:
            return scaled
        twice = self.builder.shuffle_vector(scaled, scaled, self._mask([*range(_LEVELS)] * 2))
        return self.builder.bitcast(self._rounded(twice), self._kind(self.ir.IntType(16), 2 * WIDE))

    def _looked_up(self, at: Any, table: Any) -> Any:
        """Thirty-two levels by as many halves of bytes, of which the lower comes first."""
        builder, longs = self.builder, self._kind(self.long, WIDE)
        both = builder.zext(self.load(self.code, at, self._kind(self.ir.IntType(8), WIDE)), longs)
        if self.short:  # the lower half to the lower word, the upper to the upper; higher bits do not count
            words = builder.bitcast(builder.or_(both, builder.shl(both, longs([12] * WIDE))), table.type)
            return self._called("llvm.x86.avx512.permvar.hi.512", [table, words])
        halves = [
            self._called("llvm.x86.avx512.permvar.sf.512", [table, index])
            for index in (both, builder.lshr(both, longs([4] * WIDE)))
        ]
        return builder.shuffle_vector(*halves, self._mask([part + i for i in range(WIDE) for part in (0, WIDE)]))

    def _called(self, name: str, given: list[Any]) -> Any:
        kind = self.ir.FunctionType(given[0].type, [each.type for each in given])
        return self.builder.call(self.tools.get_or_insert_function(self.builder.module, kind, name), given)


def _unpack() -> Any:
    types = importlib.import_module("numba").types

    @importlib.import_module("numba.extending").intrinsic
    def unpack(context, code, at, scale, at_scale, groups, group, levels, room, to):
        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            _Row(context, builder, signature, given).write()
            return context.get_dummy_value()

        n = types.intp
        return types.void(code, n, scale, n, n, n, levels, room, n), lower

    return unpack


# unpack(code, at, scale, at_scale, groups, group, levels, room, to): the row of codes that begins at ``at`` as numbers
# of room from ``to`` on; its groups are of whole blocks of 32 codes.
unpack: Any = Lazy(_unpack)
