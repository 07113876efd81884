"""Weights that are stored in fewer bits, with scales beside them: which they are, and each as the numbers it means."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from turnout.errors import CheckpointError, word
from turnout.models.checkpoint import compressed, fp8, mxfp4
from turnout.models.checkpoint.own import opened
from turnout.models.families.family import Family
from turnout.models.families.tensors import Slot
from turnout.types import Packed as Matrix

__all__ = ["Packed", "check_finite", "find_packed"]

_SOURCE = "name the model that it was made from, in bfloat16; or "
# Where a quantisation that is not read can be undone, and how.
_FIXES = {
    "bitsandbytes": "load it with transformers, call model.dequantize(), and save that in bfloat16",
    "gptq": _SOURCE + "dequantise it with GPTQModel, and save that in bfloat16",
    "awq": _SOURCE + "dequantise it with AutoAWQ, and save that in bfloat16",
}


_SCALES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Packed:
    """The weights of a folder that are stored in fewer bits.

    Args:
        method: how; None where all are plain.
        scales: name -> the file of its scales.
        block: of fp8: the rows and columns that share a scale; None for one scale a tensor.
        left_out: scales of inputs, which the folder holds and nothing here uses.
        shapes: of compressed-tensors: name -> the shape when it is whole.
        kinds: of those that a model can hold as they are stored: name -> how it is packed.
    """

    method: Literal["mxfp4", "fp8", "compressed-tensors"] | None = None
    scales: Mapping[str, str] = dataclasses.field(default_factory=dict)
    block: tuple[int, int] | None = None
    left_out: int = 0
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    kinds: Mapping[str, compressed.Kind] = dataclasses.field(default_factory=dict)

    def read(self, file: Any, path: Path, name: str, slot: Slot) -> None:
        """Reads one of them into its place, expert by expert where it holds several.

        Args:
            file: that its bits are in, opened.
            path: the folder.
            name: of the weight.
            slot: its place.
        """
        if self.method == compressed.METHOD:
            slot.view.copy_(slot.cut(self.matrix(file, path, name).dequantised(slot.view.dtype)))
            return
        end = (mxfp4.BLOCKS, mxfp4.SCALES) if self.method == mxfp4.METHOD else ("", fp8.SCALES)
        bits = file.get_tensor(name + end[0])
        with opened(path / self.scales[name]) as beside:
            scales = beside.get_tensor(name + end[1])
        check_finite(path, name, scales)
        if self.method == mxfp4.METHOD:
            for expert, view in enumerate(slot.view):
                view.copy_(slot.cut(mxfp4.unpack(bits[expert], scales[expert])))
            return
        block = fp8.blocks(bits.shape, scales.shape, self.block)
        assert block is not None  # seen in the headers
        if bits.ndim < 3:
            matrix = bits if bits.ndim == 2 else bits[None]
            slot.view.copy_(slot.cut(fp8.unpack(matrix, scales, block).view(bits.shape)))
            return
        for expert, view in enumerate(slot.view):
            one = scales[expert] if scales.ndim == bits.ndim else scales
            view.copy_(slot.cut(fp8.unpack(bits[expert], one, block)))

    def matrix(self, file: Any, path: Path, name: str) -> Matrix:
        """One of ``kinds`` as it is stored, in few bits; ``file``, ``path`` and ``name`` as for ``read``."""
        words, scale, _ = compressed.parts_of(name)
        words, scale = (name + mxfp4.BLOCKS, name + mxfp4.SCALES) if self.method == mxfp4.METHOD else (words, scale)
        with opened(path / self.scales[name]) as beside:
            scales = beside.get_tensor(scale)
        check_finite(path, name, scales)
        if self.method == mxfp4.METHOD:
            return mxfp4.matrix_of(file.get_tensor(words), scales)
        return compressed.unpack(file.get_tensor(words), scales, self.shapes[name])

    def notes(self, dtype: torch.dtype) -> tuple[str, ...]:
        """What is to be known of a model that is read from them."""
        if not self.scales:
            return ()
        stored = f"{len(self.scales)} weights are stored as {self.method}"
        stored += f" in blocks of {self.block[0]} x {self.block[1]}" if self.block else ""
        said = f"{stored}; read as {str(dtype).removeprefix('torch.')}, which is what is written"
        out = f"{self.left_out} scales of inputs are left out: inputs are not rounded to eight bits here"
        return (said, *([out] if self.left_out else []))


def check_finite(path: Path, name: str, scales: torch.Tensor) -> None:
    """Refuses scales that make no numbers of the codes; as a byte the largest exponent stands for none."""
    sound = scales != 255 if scales.dtype == torch.uint8 else torch.isfinite(scales.float())
    if not bool(sound.all()):
        got, fix = f"one of {name} that is none", "download the file again, or name the model that it was made from"
        raise CheckpointError(word("the scales", got=got, allowed="be finite numbers", where=str(path), fix=fix))


def find_packed(
    path: Path,
    family: Family,
    settings: Any,
    where: dict[str, str],
    dtypes: dict[str, str],
    shapes: dict[str, list[int]],
) -> Packed:
    """Puts each packed weight in place of its bits and scales: its shape as it will be, and no dtype of its own.

    Args:
        path: the folder.
        family: the architecture.
        settings: ``quantization_config`` of config.json.
        where, dtypes, shapes: of every tensor that is stored, by name; changed.

    Raises:
        CheckpointError: a quantisation that is not read, or scales that do not fit.
    """
    if not settings:
        return Packed()
    method = settings.get("quant_method", "unknown")
    if method == mxfp4.METHOD and method in family.unpacks:
        scales, kinds = {}, {}
        for name in mxfp4.unpacked(dtypes):
            bits, beside = name + mxfp4.BLOCKS, name + mxfp4.SCALES
            where[name], scales[name] = where.pop(bits), where.pop(beside)
            shapes[name], dtypes[name] = mxfp4.shape_of(shapes.pop(bits), shapes.pop(beside)), "BF16"
            kinds[name] = compressed.Kind(4, mxfp4.BLOCK, sum(shapes[name][1:2]), "bfloat16", mxfp4.METHOD)
        return Packed(mxfp4.METHOD, scales, kinds=kinds)
    if method == compressed.METHOD:
        return _find_compressed(path, settings, where, dtypes, shapes)
    if method != "fp8":
        fix = _FIXES.get(str(method), _SOURCE + "load it with transformers, dequantise it, and save it in bfloat16")
        allowed = f"not be quantised, or as {' or '.join(('fp8', compressed.METHOD, *family.unpacks))}"
        got, place = f"{method!r}", str(path / "config.json")
        raise CheckpointError(word("the weights", got=got, allowed=allowed, where=place, fix=fix))
    return _find_fp8(path, settings, where, dtypes, shapes)


def _find_compressed(
    path: Path, settings: dict[str, Any], where: dict[str, str], dtypes: dict[str, str], shapes: dict[str, list[int]]
) -> Packed:
    def refuse(problem: str) -> CheckpointError:
        fix = _SOURCE + "load it with transformers and quantization_config=CompressedTensorsConfig(dequantize=True), "
        fix += "and save that in bfloat16"
        allowed = "be whole numbers of 4 or 8 bits around zero, packed in words"
        return CheckpointError(word("the weights", got=problem, allowed=allowed, where=str(path), fix=fix))

    ways = compressed.check_settings(settings, refuse)
    names = compressed.packed_names(dtypes)
    for name in names:
        if missing := [part for part in compressed.parts_of(name) if part not in where]:
            raise refuse(f"{name} without {missing[0]}")
    whole, scales, kinds = compressed.weight_shapes(path, names, where), dict[str, str](), {}
    for name in names:
        words, scale, shape = compressed.parts_of(name)
        size, rows, groups = whole[name], shapes[words], shapes[scale]
        sound = len(size) == len(rows) == len(groups) == 2 and size[0] == rows[0] == groups[0] and min(size) > 0
        sound = (
            sound and compressed.bits_of(rows[1], size[1]) is not None and groups[1] > 0 and size[1] % groups[1] == 0
        )
        if not sound or (dtypes[words], dtypes[shape]) != ("I32", "I64") or dtypes[scale] not in _SCALES:
            got = f"{name} of shape {size} in {dtypes[words]} words {tuple(rows)} with {dtypes[scale]} scales "
            raise refuse(got + f"{tuple(groups)}")
        bits = compressed.bits_of(rows[1], size[1])
        assert bits is not None
        group = size[1] // groups[1]
        if not ways & {(bits, group), *([(bits, None)] if groups[1] == 1 else [])}:
            said = " or ".join(f"{of} bits in {'rows' if wide is None else f'groups of {wide}'}" for of, wide in ways)
            raise refuse(f"{name} of {bits} bits in groups of {group}, where config.json says {said}")
        kinds[name] = compressed.Kind(bits, size[1] // groups[1], size[1], _SCALES[dtypes[scale]])
        scales[name], where[name], shapes[name] = where.pop(scale), where.pop(words), list(size)
        for part in (words, scale, shape):
            where.pop(part, None)
            del dtypes[part], shapes[part]
    return Packed(compressed.METHOD, scales, shapes=whole, kinds=kinds)


def _find_fp8(
    path: Path, settings: dict[str, Any], where: dict[str, str], dtypes: dict[str, str], shapes: dict[str, list[int]]
) -> Packed:
    def refuse(problem: str) -> CheckpointError:
        fix = _SOURCE + "load it with transformers, which dequantises it, and save it in bfloat16"
        allowed = "be e4m3 with scales of blocks or tensors"
        return CheckpointError(word("fp8 weights", got=problem, allowed=allowed, where=str(path), fix=fix))

    block, scales = fp8.block_of(settings, refuse), dict[str, str]()
    for name in fp8.unpacked(dtypes):
        beside = name + fp8.SCALES
        if fp8.blocks(shapes[name], shapes[beside], block) is None:
            size = "one scale" if block is None else f"blocks of {block[0]} x {block[1]}"
            raise refuse(f"{name} of shape {tuple(shapes[name])} with scales {tuple(shapes[beside])} for {size}")
        scales[name] = where.pop(beside)
        del shapes[beside], dtypes[beside], dtypes[name]
    bare = sorted(name for name, kind in dtypes.items() if kind.startswith("F8_") and name in where)
    if bare:
        near = sorted(name for name in where if name.startswith(bare[0].removesuffix("weight")) and "scale" in name)
        raise refuse(f"{bare[0]} without {bare[0]}{fp8.SCALES}" + (f", but with {', '.join(near[:3])}" if near else ""))
    inputs = [name for name in where if name.rpartition(".")[2].endswith(fp8.ACTIVATION)]
    for name in inputs:
        del where[name], shapes[name], dtypes[name]
    return Packed("fp8", scales, block, len(inputs))
