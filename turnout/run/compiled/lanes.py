"""The few things that kernels need and Python has no word for."""

import importlib
from typing import Any

from turnout.run.compiled.engine import Lazy

__all__ = ["prange", "wide"]


def _prange() -> Any:
    return importlib.import_module("numba").prange


def _wide() -> Any:
    types = importlib.import_module("numba").types
    ir = importlib.import_module("numba.core.cgutils").ir  # llvmlite's, as numba itself has it

    @importlib.import_module("numba.extending").intrinsic
    def wide(context: Any, value: Any) -> Any:
        """A number as float32: uint16 holds the bits of a bfloat16, int16 those of a float16."""

        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            (bits,), (kind,) = given, signature.args
            if kind == types.float32:
                return bits
            if kind == types.uint16:
                long = ir.IntType(32)
                return builder.bitcast(builder.shl(builder.zext(bits, long), long(16)), ir.FloatType())
            if kind == types.int16:
                return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
            return builder.sitofp(bits, ir.FloatType())

        return types.float32(value), lower

    return wide


# A loop over this in a kernel with ``threaded=True`` is shared by threads.
prange = Lazy(_prange)
# wide(value): the float32 that float32, bfloat16 (as uint16), float16 (as int16) or int8 stand for.
wide = Lazy(_wide)
