"""How rows are laid out for the codes that they meet: in fp32 or rounded to bfloat16, as numbers come out of codes."""

import importlib
from typing import Any

import numpy as np

from turnout.run.compiled.engine import Lazy, kernel
from turnout.run.compiled.lanes import BLOCK, LANES, wide
from turnout.run.compiled.narrow import narrow
from turnout.run.compiled.tables import begins, brains

__all__ = [
    "BYTES",
    "NIBBLES",
    "PARTED",
    "PLAIN",
    "SHORT",
    "close",
    "close_at",
    "lay_out",
    "lay_out_at",
    "lay_row",
    "order",
    "place",
]

# In fp32: as they are, and the even places of a block before its odd ones. From SHORT on in bfloat16: as they are; as
# bytes become words (``turnout.run.compiled.short_tile``), within 64; every fourth, within 128.
PLAIN = 0
PARTED = 1
SHORT = 2
BYTES = 3
NIBBLES = 4


def _order() -> Any:
    types = importlib.import_module("numba").types

    @importlib.import_module("numba.extending").intrinsic
    def order(context: Any, code: Any, room: Any) -> Any:
        known = {types.uint16: PARTED, types.uint8: PARTED}
        if room.dtype == types.uint16:
            known = {types.uint16: SHORT, types.int8: BYTES, types.uint8: NIBBLES}

        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return context.get_constant(types.intp, known.get(code.dtype, PLAIN))

        return types.intp(code, room), lower

    return order


# order(code, room): how rows in such a room, fp32 or bfloat16, are laid out for such codes.
order: Any = Lazy(_order)


@kernel(exact=True)
def place(i, order):
    """Where number i of a row stands when it is laid out."""
    if order == PARTED:
        inside = i % (2 * LANES)
        return i - inside + (inside & 1) * LANES + (inside >> 1)
    if order == BYTES:
        inside = i % 64
        return i - inside + ((inside >> 3) & 1) * 32 + (inside >> 4) * 8 + (inside & 7)
    if order == NIBBLES:
        inside = i % 128
        return i - inside + (inside & 3) * 32 + (inside >> 2)
    return i


@kernel(exact=True)
def close(room, ins, order):
    """Writes the zeros after so many numbers, up to whole blocks."""
    block = 128 if order == NIBBLES else 64 if order == BYTES else BLOCK
    for i in range(ins, (ins + block - 1) // block * block):
        room[place(i, order)] = narrow(np.float32(0), room[0])


@kernel(exact=True)
def _whole(x_64, room, at, order):
    """64 numbers from a border of 64 on, whose first one's place is ``at``, in loops that LLVM makes vectors of."""
    if order == NIBBLES:
        for part in range(4):
            room_16 = room[at + 32 * part : at + 32 * part + 16]
            for i in range(16):
                room_16[i] = narrow(wide(x_64[4 * i + part]), room[0])
    elif order == BYTES:
        for lane in range(4):
            low_8, high_8 = room[at + 8 * lane : at + 8 * lane + 8], room[at + 32 + 8 * lane : at + 40 + 8 * lane]
            for i in range(8):
                low_8[i] = narrow(wide(x_64[16 * lane + i]), room[0])
                high_8[i] = narrow(wide(x_64[16 * lane + 8 + i]), room[0])
    elif order == PARTED:
        for begin in range(0, 64, 2 * LANES):
            even, odd = room[at + begin : at + begin + LANES], room[at + begin + LANES : at + begin + 2 * LANES]
            for i in range(LANES):
                even[i] = narrow(wide(x_64[begin + 2 * i]), room[0])
                odd[i] = narrow(wide(x_64[begin + 2 * i + 1]), room[0])
    else:
        room_64 = room[at : at + 64]
        for i in range(64):
            room_64[i] = narrow(wide(x_64[i]), room[0])


@kernel(exact=True)
def lay_out(x_N, first, room, order):
    """Writes numbers from ``first`` on of a row into its room, in fp32 or in bfloat16 as the room is."""
    count = x_N.shape[0]
    lead = min(count, (64 - first % 64) % 64)
    whole = lead + (count - lead) // 64 * 64
    for i in range(lead):
        room[place(first + i, order)] = narrow(wide(x_N[i]), room[0])
    for begin in range(lead, whole, 64):
        _whole(x_N[begin : begin + 64], room, place(first + begin, order), order)
    for i in range(whole, count):
        room[place(first + i, order)] = narrow(wide(x_N[i]), room[0])


@kernel(exact=True)
def lay_row(x_I, room, order):
    """A whole row, with the zeros after it."""
    lay_out(x_I, 0, room, order)
    close(room, x_I.shape[0], order)


@kernel(exact=True)
def lay_out_at(x_N, first, row_F, order):
    """The same where the room is the memory of an fp32 row, of which bfloat16 needs half."""
    if order >= SHORT:
        lay_out(x_N, first, brains(begins(row_F), 2 * row_F.shape[0]), order)
    else:
        lay_out(x_N, first, row_F, order)


@kernel(exact=True)
def close_at(row_F, ins, order):
    """The zeros after so many numbers, likewise."""
    if order >= SHORT:
        close(brains(begins(row_F), 2 * row_F.shape[0]), ins, order)
    else:
        close(row_F, ins, order)
