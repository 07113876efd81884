"""A float32 as the number of an array that holds fewer bits."""

import importlib
from typing import Any

from turnout.run.compiled.engine import Lazy

__all__ = ["narrow"]


def _narrow() -> Any:
    types = importlib.import_module("numba").types
    ir = importlib.import_module("numba.core.cgutils").ir  # llvmlite's, as numba itself has it

    @importlib.import_module("numba.extending").intrinsic
    def narrow(context: Any, value: Any, like: Any) -> Any:
        """The value as ``like`` holds numbers: float32, bfloat16 (uint16) or float16 (int16), to the nearest even."""

        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            wide, long = given[0], ir.IntType(32)
            if like == types.float32:
                return wide
            if like == types.int16:
                return builder.bitcast(builder.fptrunc(wide, ir.HalfType()), ir.IntType(16))
            bits = builder.bitcast(wide, long)
            odd = builder.and_(builder.lshr(bits, long(16)), long(1))
            near = builder.lshr(builder.add(bits, builder.add(odd, long(0x7FFF))), long(16))
            # Rounding up could carry what is no number to an infinity or a zero.
            none = builder.icmp_unsigned(">", builder.and_(bits, long(0x7FFFFFFF)), long(0x7F800000))
            return builder.trunc(builder.select(none, long(0x7FC0), near), ir.IntType(16))

        return like(types.float32, like), lower

    return narrow


# narrow(value, like): the float32 as an array with numbers like that holds it.
narrow = Lazy(_narrow)
