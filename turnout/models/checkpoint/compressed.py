"""Weights in eight or four bits as compressed-tensors packs them, which transformers loads: in and out."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turnout.errors import TurnoutError
from turnout.models.checkpoint.own import opened
from turnout.reading import check_fields
from turnout.types import Packed

__all__ = [
    "METHOD",
    "Kind",
    "check_settings",
    "pack",
    "packed_names",
    "parts_of",
    "settings",
    "unpack",
    "weight_shapes",
]

METHOD = "compressed-tensors"
_FORMAT = "pack-quantized"
_WEIGHT, _PACKED, _SCALE, _SHAPE = ".weight", ".weight_packed", ".weight_scale", ".weight_shape"
_WORD = 32
# What a configuration may ask for beside packed weights.
_MORE = {
    "kv_cache_scheme": "keys and values that are rounded too",
    "transform_config": "weights of inputs that are rotated first",
    "sparsity_config": "weights of which zeros are left out",
    "moe_sparsity_config": "layers with experts left out",
}
Refuse = Callable[[str], TurnoutError]


@dataclasses.dataclass(frozen=True)
class Kind:
    """How one matrix is packed: bits, the inputs that share a scale and all of them, the dtype of scales, the codes."""

    bits: int
    group: int
    inner: int
    scale: str
    codes: str = "int"


def pack(packed: Packed) -> dict[str, Tensor]:
    """What a folder holds of one matrix, by the end of the name: words of 32 bits, scales, and the shape.

    Each word holds as many codes as it has room for, the first lowest, and a code is the value and half the range more.

    Args:
        packed: a matrix, without levels.

    >>> found = pack(Packed.of(torch.tensor([[1, -8, 7, 0]]), torch.ones(1, 1), group=4, bits=4))
    >>> hex(found[".weight_packed"].item()), found[".weight_shape"].tolist()
    ('0x8f09', [1, 4])

    Source: the format pack-quantized of compressed-tensors, symmetric.
    """
    code = packed.code if packed.bits == 4 else packed.code.view(torch.uint8) ^ 0x80
    spare = -code.shape[1] % (_WORD // 8)
    if spare:
        code = torch.nn.functional.pad(code, (0, spare))
    shape = torch.tensor(packed.shape, dtype=torch.int64)
    return {_PACKED: code.contiguous().view(torch.int32), _SCALE: packed.scale, _SHAPE: shape}


def unpack(words: Tensor, scale: Tensor, shape: Iterable[int]) -> Packed:
    """The matrix of ``pack``; how many bits and how large a group is seen in the shapes.

    Args:
        words: (O, W) int32.
        scale: (O, I / group).
        shape: (O, I).

    >>> one = Packed.of(torch.tensor([[1, -8, 7, 0, 5, 6, 7, 99]]), torch.ones(1, 1), group=8, bits=8)
    >>> unpack(*pack(one).values()).values()
    tensor([[ 1, -8,  7,  0,  5,  6,  7, 99]], dtype=torch.int8)

    Source: as ``pack``.
    """
    inner = int(list(shape)[1])
    bits = bits_of(words.shape[1], inner)
    assert bits is not None  # seen in the headers
    code = words.contiguous().view(torch.uint8)[:, : inner * bits // 8].contiguous()
    code = code if bits == 4 else (code ^ 0x80).view(torch.int8)
    return Packed(code, scale.contiguous(), inner // scale.shape[1], bits)


def bits_of(words: int, inner: int) -> int | None:
    """The bits of a weight, of 4 and 8, that so many words of a row of ``inner`` hold; None for others, or for both."""
    fit = [bits for bits in (4, 8) if math.ceil(inner * bits / _WORD) == words and inner * bits % 8 == 0]
    return fit[0] if len(fit) == 1 else None


def settings(packed: Mapping[str, Packed], whole: Iterable[str]) -> dict[str, Any]:
    """``quantization_config`` of config.json.

    Args:
        packed: the matrices, by name; of the same bits, all with one scale a row or all with groups of one size.
        whole: modules whose matrices are not packed.
    """
    one = next(iter(packed.values()))
    by_row = all(each.group == each.shape[-1] for each in packed.values())
    weights = {
        "num_bits": one.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if by_row else "group",
        "group_size": None if by_row else one.group,
        "dynamic": False,
    }
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": METHOD,
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme | {"format": _FORMAT}},
        "ignore": sorted(whole),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def check_settings(given: Mapping[str, Any], refuse: Refuse) -> set[tuple[int, int | None]]:
    """Refuses a ``quantization_config`` whose weights are no whole numbers around zero, packed in words.

    Returns:
        The ways in which it says that weights are packed: bits, and the inputs that share a scale; None for a row.

    Raises:
        TurnoutError: what ``refuse`` words.
    """
    ways = set[tuple[int, int | None]]()
    check_fields(given, {"format": str, "config_groups": dict[str, dict]}, refuse)
    for name, what in _MORE.items():
        if (given.get(name) or {}) not in ({}, {"format": "dense"}):
            raise refuse(f"{what} ({name})")
    for name, scheme in given["config_groups"].items():
        weights = scheme.get("weights") or {}
        form = scheme.get("format") or given["format"]
        if form != _FORMAT:
            raise refuse(f"the format {form!r} of {name}, where {_FORMAT!r} is read")
        kind = weights.get("type"), weights.get("symmetric"), weights.get("strategy")
        if kind not in (("int", True, "group"), ("int", True, "channel")) or weights.get("num_bits") not in (4, 8):
            raise refuse(f"weights of {name} with {weights.get('num_bits')} bits, {', '.join(map(str, kind))}")
        if weights.get("actorder") not in (None, "static", "weight"):
            raise refuse(f"groups of {name} in another order than that of inputs (actorder {weights['actorder']!r})")
        if scheme.get("input_activations") or scheme.get("output_activations"):
            raise refuse(f"inputs or outputs of {name} that are rounded too")
        size = weights.get("group_size") if kind[2] == "group" else None
        if kind[2] == "group" and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise refuse(f"groups of {name} of group_size {size!r}")
        ways.add((weights["num_bits"], size))
    return ways


def packed_names(names: Iterable[str]) -> list[str]:
    """The weights that are packed, named as if they were whole."""
    return [name.removesuffix(_PACKED) + _WEIGHT for name in names if name.endswith(_PACKED)]


def parts_of(name: str) -> tuple[str, str, str]:
    """What the words, the scales and the shape of a weight are called."""
    stem = name.removesuffix(_WEIGHT)
    return stem + _PACKED, stem + _SCALE, stem + _SHAPE


def weight_shapes(path: Path, names: Iterable[str], where: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The shapes that packed weights have when they are whole, as the folder says.

    Args:
        path: the folder.
        names: of the weights.
        where: tensor name -> file.
    """
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(where[parts_of(name)[2]], []).append(name)
    found = {}
    for file, some in by_file.items():
        with opened(path / file) as tensors:
            for name in some:
                found[name] = tuple(int(size) for size in tensors.get_tensor(parts_of(name)[2]).flatten().tolist())
    return found
