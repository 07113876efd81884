"""What kernels ask of single float32: bits there and back, and a product that is added without being rounded before."""

import importlib
from typing import Any

from turnout.run.compiled.engine import Lazy
from turnout.run.compiled.lanes import features

__all__ = ["as_bits", "as_float", "fused"]


def _cast(to: str, given: str) -> Any:
    types = importlib.import_module("numba").types
    kind, known = getattr(types, to), getattr(types, given)

    @importlib.import_module("numba.extending").intrinsic
    def cast(context: Any, value: Any) -> Any:
        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.bitcast(given[0], context.get_value_type(kind))

        return kind(known), lower

    return cast


def _fused() -> Any:
    types, tools = importlib.import_module("numba").types, importlib.import_module("numba.core.cgutils")
    # Without the instruction it would be a call of a library for each number.
    machine = importlib.import_module("platform").machine().lower()
    has = "fma" in features() or machine in ("arm64", "aarch64")

    @importlib.import_module("numba.extending").intrinsic
    def fused(context: Any, a: Any, b: Any, c: Any) -> Any:
        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            if not has:
                return builder.fadd(builder.fmul(given[0], given[1]), given[2])
            real = tools.ir.FloatType()
            kind = tools.ir.FunctionType(real, [real] * 3)
            return builder.call(tools.get_or_insert_function(builder.module, kind, "llvm.fma.f32"), given)

        real = types.float32
        return real(real, real, real), lower

    return fused


# as_bits(value): the int32 whose bits are those of this float32.
as_bits: Any = Lazy(lambda: _cast("int32", "float32"))
# as_float(bits): the float32 whose bits are those of this int32.
as_float: Any = Lazy(lambda: _cast("float32", "int32"))
# fused(a, b, c): a b + c, rounded once where the processor can.
fused: Any = Lazy(_fused)
