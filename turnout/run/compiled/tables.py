"""Tables of where a model's numbers lie: what a compiled step reads instead of modules.

A kernel that took every weight as an argument would be compiled for each model and called at the price of each
argument. These records hold addresses and sizes: one kernel for all models, one call a step. Whoever fills a table
keeps the tensors alive while it is used (``turnout.run.compiled.kept``).
"""

import importlib
from typing import Any

import numpy as np
import torch

from turnout.run.compiled.engine import Lazy

__all__ = ["CODES", "LAYER", "MODEL", "NORM", "PAGE", "begins", "brains", "floats", "halves", "view", "wholes"]

# How numbers are stored that a step reads one at a time, as a table says it.
FLOAT, BRAIN, HALF = 0, 1, 2
CODES = {torch.float32: FLOAT, torch.bfloat16: BRAIN, torch.float16: HALF}
SIZES = (4, 2, 2)

# A matrix, or a stack of them for experts: the address of the kernel for its format (``turnout.run.compiled.times``),
# of its numbers or codes, of scales and levels; how many codes lie between two matrices and between two rows, and
# how many scales between two matrices; its sizes; scales of a row, and the numbers that share one; how rows that
# meet it are laid out (``turnout.run.compiled.order``); the address of its biases in fp32, 0 for none, and how
# many lie between two.
KERNEL, AT, SCALE, LEVELS, NEXT, STRIDE, SCALE_NEXT, OUTS, INS, GROUPS, GROUP, ORDER, BIAS, BIAS_NEXT = range(14)
COLUMNS = 14
# So many positions of a text lie after each other in memory.
PAGE = 64
# A norm: fp32 weights and biases (0 for none); by mean and variance (layer), or by the root mean square.
NORM = np.dtype([("weight", "i8"), ("bias", "i8"), ("layer", "i8"), ("eps", "f4")], align=True)
_LAYER = {
    # of attention; -1 where there is no such norm; which table of pages says where its keys and values are, of which
    # each head has so many slots
    "i8": "norm qkv out out_norm q_norm k_norm qk_full heads key_heads head_width rotated local window keys "
    "values cache_code sinks group slots "
    # of latent attention, where ``latent`` is not 0: the width of latents, maps, and how pairs are turned
    "latent q_down q_up kv_down k_up v_up neighbours "
    # of the feed-forward layer: where routed, how; ``routes``, where its choices are written to, or 0
    "ff_norm ff_out_norm routed router sigmoid correction groups top_groups best_two renormalize top_k labels routes "
    "up down shared_up shared_down shared_gate "
    # where experts come into slots: whom to ask, 0 for nobody, and as which layer
    "ready number",
    "f4": "scale softcap residual floor weight_scale",
}
LAYER = np.dtype(
    [(n, kind) for kind, names in _LAYER.items() for n in names.split()] + [("activation", "i8")], align=True
)
_MODEL = {
    "i8": "width vocab embedding embedding_code positions positions_code norm head frequencies local_frequencies pairs",
    "f4": "embedding_scale divisor softcap magnitude",
}
MODEL = np.dtype([(name, kind) for kind, names in _MODEL.items() for name in names.split()], align=True)


def _view(kind: str) -> Any:
    numba = importlib.import_module("numba")
    types = numba.types
    number = {"f": types.float32, "b": types.uint16, "h": types.int16, "w": types.int64}[kind]

    @importlib.import_module("numba.extending").intrinsic
    def pointer(context: Any, address: Any) -> Any:
        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.inttoptr(given[0], context.get_value_type(types.CPointer(number)))

        return types.CPointer(number)(types.int64), lower

    carray = numba.carray

    @numba.njit
    def view(address: Any, count: Any) -> Any:
        return carray(pointer(address), count)

    return view


def _floats() -> Any:
    return _view("f")


def _brains() -> Any:
    return _view("b")


def _halves() -> Any:
    return _view("h")


def _wholes() -> Any:
    return _view("w")


def _carray() -> Any:
    return importlib.import_module("numba").carray


def _place() -> Any:
    types = importlib.import_module("numba").types

    @importlib.import_module("numba.extending").intrinsic
    def place(context: Any, array: Any) -> Any:
        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            data = context.make_array(signature.args[0])(context, builder, given[0]).data
            return builder.ptrtoint(data, context.get_value_type(types.int64))

        return types.int64(array), lower

    return place


# floats(address, count): that many fp32 numbers from there; the others of bfloat16, float16 and int64.
floats: Any = Lazy(_floats)
brains: Any = Lazy(_brains)
halves: Any = Lazy(_halves)
wholes: Any = Lazy(_wholes)
# view(pointer, count): the same of a pointer that knows what it points to.
view: Any = Lazy(_carray)
# begins(array): the address of its first number.
begins: Any = Lazy(_place)
