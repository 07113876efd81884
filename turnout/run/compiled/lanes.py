"""The few things that kernels need and Python has no word for: loops for threads, bits as numbers, vectors' width."""

import importlib
from typing import Any

from turnout.run.compiled.engine import Lazy

__all__ = ["BLOCK", "LANES", "ROOM", "features", "prange", "wide", "widened"]

# A block of the widest vectors: what rows in fp32 are filled up to, and what groups of packed weights consist of.
BLOCK = 32
# What the room for a row is a multiple of, in fp32: rows in bfloat16 are filled up to 128 numbers, in half of it.
ROOM = 64


def _prange() -> Any:
    return importlib.import_module("numba").prange


def features() -> frozenset[str]:
    """What the processor that kernels are compiled for has, in LLVM's words; what NUMBA_CPU_FEATURES says goes first.

    >>> "nothing of the kind" in features() if importlib.util.find_spec("numba") else False
    False

    Source: none; a question to numba.
    """
    codegen = importlib.import_module("numba.core.registry").cpu_target.target_context.codegen()
    named = codegen._tm_features.split(",")
    return frozenset(one[1:] for one in named if one.startswith("+"))


def _lanes() -> Any:
    return 16 if "avx512f" in features() else 8


def widened(builder: Any, bits: Any, kind: Any) -> Any:
    """The float32 of one number: uint16 is a bfloat16, int16 a float16, uint8 an exponent of two, int8 a number.

    Args:
        builder: llvmlite's.
        bits: the number, a value of llvmlite's.
        kind: its type, one of numba's.

    Source: none; Open Compute Project, 2023, "OCP Microscaling Formats", for the exponents (E8M0).
    """
    types = importlib.import_module("numba").types
    ir = importlib.import_module("numba.core.cgutils").ir  # llvmlite's, as numba itself has it
    real, long = ir.FloatType(), ir.IntType(32)
    if kind == types.float32:
        return bits
    if kind == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(bits, long), long(16)), real)
    if kind == types.int16:
        return builder.fpext(builder.bitcast(bits, ir.HalfType()), real)
    if kind == types.uint8:  # 0 is 2^-127, which is subnormal
        power = builder.shl(builder.zext(bits, long), long(23))
        return builder.bitcast(builder.select(builder.icmp_unsigned("==", power, long(0)), long(1 << 22), power), real)
    return builder.sitofp(bits, real)


def _wide() -> Any:
    types = importlib.import_module("numba").types

    @importlib.import_module("numba.extending").intrinsic
    def wide(context: Any, value: Any) -> Any:
        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return widened(builder, given[0], signature.args[0])

        return types.float32(value), lower

    return wide


# A loop over this in a kernel with ``threaded=True`` is shared by threads.
prange: Any = Lazy(_prange)
# wide(value): the float32 that a float32, bfloat16 (as uint16), float16 (as int16), int8 or e8m0 (as uint8) stands for.
wide: Any = Lazy(_wide)
# How many float32 the vectors have that kernels are written in.
LANES: Any = Lazy(_lanes)
