"""A word to the processor that memory will be read soon: where it does not guess so itself."""

import importlib
from typing import Any

from turnout.run.compiled.engine import Lazy

__all__ = ["LINE", "fetch"]

# Bytes that are read at once.
LINE = 64


def _fetch() -> Any:
    types = importlib.import_module("numba").types
    tools = importlib.import_module("numba.core.cgutils")

    @importlib.import_module("numba.extending").intrinsic
    def fetch(context: Any, data: Any, at: Any) -> Any:
        """Number ``at`` of the array is read soon; it may lie outside."""

        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            ir = tools.ir
            pointer = context.make_array(signature.args[0])(context, builder, given[0]).data
            place = builder.bitcast(builder.gep(pointer, [given[1]]), ir.IntType(8).as_pointer())
            long = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [place.type, long, long, long])
            function = tools.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(function, [place, long(0), long(3), long(1)])  # to read, into the nearest cache, data
            return context.get_dummy_value()

        return types.void(data, types.intp), lower

    return fetch


# fetch(data, at): starts to bring number ``at`` of the array, and the line of memory around it, into the cache.
fetch: Any = Lazy(_fetch)
