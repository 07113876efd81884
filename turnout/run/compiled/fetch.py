"""A word to the processor that memory will be read soon: where it does not guess so itself."""

import importlib
from typing import Any

from turnout.run.compiled.engine import Lazy

__all__ = ["LINE", "fetch", "write_fetch"]

# Bytes that are read at once.
LINE = 64


def write_fetch(builder: Any, data: Any, at: Any, *, near: bool = True) -> None:
    """Writes the word: that number ``at`` from the pointer on is read soon; it may lie outside.

    Args:
        builder: llvmlite's.
        data: a pointer.
        at: a whole number, a value of llvmlite's.
        near: into the nearest cache too, or into all others.
    """
    tools = importlib.import_module("numba.core.cgutils")
    ir = tools.ir
    long, place = ir.IntType(32), builder.bitcast(builder.gep(data, [at]), ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [place.type, long, long, long])
    function = tools.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [place, long(0), long(3 if near else 2), long(1)])  # to read, how near, data


def _fetch() -> Any:
    types = importlib.import_module("numba").types

    @importlib.import_module("numba.extending").intrinsic
    def fetch(context: Any, data: Any, at: Any) -> Any:
        """Number ``at`` of the array is read soon; it may lie outside."""

        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            write_fetch(builder, context.make_array(signature.args[0])(context, builder, given[0]).data, given[1])
            return context.get_dummy_value()

        return types.void(data, types.intp), lower

    return fetch


# fetch(data, at): starts to bring number ``at`` of the array, and the line of memory around it, into the cache.
fetch: Any = Lazy(_fetch)
