"""What tiles of AVX-512 are written in: vectors of sixteen float32, and their products, in LLVM's words."""

import importlib
from typing import Any

from turnout.run.compiled.engine import Lazy

__all__ = ["WIDE", "Vectors", "bfloat"]

# How many float32 a vector has.
WIDE = 16


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


_BFLOAT = Lazy(_bfloat)


def bfloat() -> Any:
    """LLVM's type of a bfloat16."""
    return _BFLOAT.made()


class Vectors:
    """Writes what a tile does with vectors; in bfloat16 with the processor's own product of pairs, summed in float32.

    Args:
        context: numba's.
        builder: llvmlite's.
        short: whether numbers are bfloat16.
    """

    def __init__(self, context: Any, builder: Any, *, short: bool) -> None:
        self.tools = importlib.import_module("numba.core.cgutils")
        self.ir, self.context, self.builder, self.short = self.tools.ir, context, builder, short
        self.real, self.long, self.word = self.ir.FloatType(), self.ir.IntType(32), self.ir.IntType(64)
        self.vector = self.ir.VectorType(self.real, WIDE)

    @property
    def pairs(self) -> Any:
        """A vector of bfloat16, two for each sum."""
        return self.ir.VectorType(_BFLOAT.made(), 2 * WIDE)

    def data(self, kind: Any, value: Any) -> Any:
        """Where the numbers of an array begin."""
        return self.context.make_array(kind)(self.context, self.builder, value).data

    def zeros(self, count: int) -> list[Any]:
        """So many sums that begin at 0 here, which LLVM keeps in registers."""
        made = [self.tools.alloca_once(self.builder, self.vector) for _ in range(count)]
        for each in made:
            self.builder.store(self.vector([0.0] * WIDE), each)
        return made

    def load(self, data: Any, at: Any, kind: Any) -> Any:
        """What lies there, as this kind."""
        return self.builder.load(self.builder.bitcast(self.builder.gep(data, [at]), kind.as_pointer()), align=1)

    def add(self, a: Any, b: Any, into: Any) -> None:
        """Adds the products of two vectors to a sum."""
        given, name = [a, b, self.builder.load(into)], f"llvm.fma.v{WIDE}f32"
        if self.short:
            given = [given[2], *(self.builder.bitcast(each, self.pairs) for each in (a, b))]
            name = "llvm.x86.avx512bf16.dpbf16ps.512"
        kind = self.ir.FunctionType(self.vector, [each.type for each in given])
        product = self.tools.get_or_insert_function(self.builder.module, kind, name)
        self.builder.store(self.builder.call(product, given), into)

    def store(self, some: Any, data: Any, at: Any, *, narrow: bool | None = None) -> None:
        """Puts float32 there, rounded where numbers are bfloat16, or as told."""
        if self.short if narrow is None else narrow:
            some = self.builder.fptrunc(some, self.ir.VectorType(_BFLOAT.made(), some.type.count))
        self.builder.store(some, self.builder.bitcast(self.builder.gep(data, [at]), some.type.as_pointer()), align=1)
