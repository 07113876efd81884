"""The tiles of every format, for 1, 2, 4 and 8 rows, as kernels call them."""

import importlib
from typing import Any

from turnout.run.compiled.engine import Lazy
from turnout.run.compiled.short_tile import ShortTile
from turnout.run.compiled.tile import Tile

__all__ = ["tile_1", "tile_2", "tile_4", "tile_8"]


def _tile(rows: int) -> Any:
    types = importlib.import_module("numba").types

    @importlib.import_module("numba.extending").intrinsic
    def tile(
        context, code, at, stride, scale, at_scale, groups, group, levels, x, at_x, ins, out, at_out, far, outs, then
    ):
        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            kind = ShortTile if signature.args[8].dtype == types.uint16 else Tile
            kind(context, builder, signature, given, rows).write()
            return context.get_dummy_value()

        n = types.intp
        return types.void(code, n, n, scale, n, n, n, levels, x, n, n, out, n, n, n, n), lower

    return tile


# tile_M(code, at, stride, scale, at_scale, groups, group, levels, x, at_x, stride_x, out, at_out, stride_out, outs,
# then): writes the sums of M rows with ``outs`` outputs, 1 to 4, whose weights begin at ``at`` and lie ``stride``
# apart, from ``at_out`` on; what is read after them begins at ``then``.
tile_1: Any = Lazy(lambda: _tile(1))
tile_2: Any = Lazy(lambda: _tile(2))
tile_4: Any = Lazy(lambda: _tile(4))
tile_8: Any = Lazy(lambda: _tile(8))
