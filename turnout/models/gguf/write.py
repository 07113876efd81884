"""Models as GGUF, the file of llama.cpp: its tensors by its names, in as many bits as asked, and its tokenizer."""

import dataclasses
import importlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from turnout.errors import StorageError, UsageError, nearest, word
from turnout.expects import PATH, expects
from turnout.models.checkpoint.own import bare, empty, read_json
from turnout.models.config import LMConfig
from turnout.models.gguf.architectures import Architecture, architecture_for
from turnout.models.gguf.few_bits import Blocks, check_kind, packed_pieces
from turnout.models.gguf.tensors import Piece, pieces, silence
from turnout.models.gguf.tokens import add_no_tokenizer, add_tokenizer
from turnout.models.gguf.values import describe, notes
from turnout.models.lm import LM
from turnout.storage import write_whole

__all__ = ["GGUFFile", "Kind", "to_gguf"]

Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "mxfp4"]
_WHERE = "turnout.models.gguf.to_gguf"
# The largest number that each type holds; in few bits the scale is what fp16 holds.
_HALF_MOST = 65504.0
# Types in which 32 neighbours share a scale.
_SHARED, _BLOCK = ("q8_0", "q4_0", "mxfp4"), 32
_MOST = {"F16": _HALF_MOST, "BF16": 3.38e38, "Q8_0": 127 * _HALF_MOST, "Q4_0": 8 * _HALF_MOST}


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """What was written.

    Args:
        architecture: of llama.cpp.
        tensors: how many are of each type.
        size_bytes: of the file.
        notes: what else is to be known of it.

    >>> GGUFFile("llama", {"F32": 3}, 1000).tensors["F32"]
    3

    Source: none; plain bookkeeping.
    """

    architecture: str
    tensors: Mapping[str, int]
    size_bytes: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(self.tensors.items()))
        return "\n".join([f"{self.architecture}, {self.size_bytes:,} bytes, tensors: {kinds}", *self.notes])


@expects(path=PATH)
def to_gguf(
    lm: nn.Module, path: str | Path, *, kind: Kind = "q8_0", tokenizer: bool = True, like: str | Path | None = None
) -> GGUFFile:
    """Writes the model as one GGUF file, which llama.cpp and what builds on it loads.

    The file appears whole or not at all. Matrices are stored in the type asked for; norms, biases and routers stay in
    fp32. In "q8_0" and "q4_0" 32 neighbours share a scale; a matrix whose rows are no multiple of that stays in fp32,
    and in "q4_0" the embedding and the output layer are stored as "q8_0".

    Maps that the model holds in few bits keep their codes where the type has the numbers that they mean, and are
    refused where it has not: nothing is rounded a second time. Integers in rows, or in groups of 32 or more, fit
    "q8_0", those of 4 bits "q4_0" too; MXFP4 fits "mxfp4" and "q8_0". Scales become fp16; where that changes one, a
    note says by how much. What llama.cpp has turned over, of latent attention, is written in fp32.

    Args:
        lm: the model, on any device; also a wrapped one.
        path: the file; must not exist.
        kind: "f32", "f16", "bf16", "q8_0" (8.5 bits a weight), "q4_0" (4.5); or "mxfp4", of a model that is held in it
            (``from_hf(packed=True)``), whose other weights stay in their dtype.
        tokenizer: whether the tokenizer goes along; without one the file takes and gives token ids alone.
        like: the folder whose tokenizer to take; None for the one that the model came from.

    Raises:
        UsageError: llama.cpp has no architecture that computes what the model does, or no such tokenizer; the message
            names why. Or weights that the type cannot hold, or would round a second time. Or the package gguf is not
            installed.
        StorageError: the file exists, or cannot be written.

    >>> from turnout.models.lm import LM, LMConfig
    >>> to_gguf(LM(LMConfig(vocab_size=8, width=8, layers=1, heads=2)), "unused", kind="q5_1")
    Traceback (most recent call last):
    turnout.errors.UnknownNameError: unknown kind 'q5_1' in turnout.models.gguf.to_gguf...

    Source: Gerganov et al., the file format of ggml; compared with llama.cpp's own logits.
    """
    if kind not in get_args(Kind):
        raise nearest(str(kind), get_args(Kind), kind="kind", where=_WHERE)
    gguf, path, inside = _library(), Path(path), bare(lm)
    if path.exists():
        fix = "choose a new name"
        raise StorageError(word("the file", got=str(path), allowed="be new", where=_WHERE, fix=fix))
    folder = inside.origin if like is None else Path(like)
    plain = dataclasses.replace(inside.config, quantized=None)
    _check_bits(inside.config, kind)
    its, config = architecture_for(plain, prefer=_kind_of(folder))
    writer = gguf.GGUFWriter(None, its.name)
    writer.add_file_type(_file_type(gguf, kind))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe(writer, config, its)
    said = list(notes(config, inside.embedding.dtype))
    said += add_tokenizer(writer, folder, config.vocab_size) if tokenizer else add_no_tokenizer(writer)
    parts = [(piece, _type_of(gguf, piece, kind)) for piece in _pieces(inside, config, its)]
    _announce(gguf, writer, parts)
    moved: list[float] = []
    write_whole(path, lambda aside: _write(writer, parts, aside, moved))
    count = Counter(chosen.name for _, chosen in parts)
    told = (*said, *_told(parts, kind, moved))
    return GGUFFile(its.name, dict(count), path.stat().st_size, told)


def _told(parts: list[tuple[Piece, Any]], kind: Kind, moved: list[float]) -> Iterator[str]:
    """What is to be known of the tensors."""
    rest = [piece for piece, chosen in parts if not piece.exact and chosen.name == "F32" and kind in _SHARED]
    odd = [piece.name for piece in rest if piece.shape[-1] % _BLOCK]
    if odd:
        yield f"{len(odd)} tensors have rows that are no multiple of 32 and stay in fp32: {', '.join(odd[:2])}"
    if worst := max(moved, default=0):
        yield f"{sum(map(bool, moved))} tensors have scales that fp16 rounds, by {worst:.1g} of them at most"


def _announce(gguf: Any, writer: Any, parts: list[tuple[Piece, Any]]) -> None:
    """Tells the file which tensors come, before any is made."""
    for piece, chosen in parts:
        shape = gguf.quant_shape_to_byte_shape(piece.shape, chosen) if chosen.name != "F32" else piece.shape
        size = int(np.prod(shape, dtype=np.int64)) * (4 if chosen.name == "F32" else 1)
        kept = np.dtype(np.float32 if chosen.name == "F32" else np.uint8)
        writer.add_tensor_info(piece.name, shape, kept, size, raw_dtype=chosen)


def _check_bits(config: LMConfig, kind: str) -> None:
    """Refuses a type that weights in few bits have not, and one that whole weights are never rounded to."""
    if config.quantized is not None and kind in _SHARED:
        check_kind(config, kind)
    elif config.quantized is not None:
        got = f"{kind} for weights in few bits"
        fix = "write the weights out first (turnout convert --densify --gguf; turnout.reshape.densify)"
        raise UsageError(word("kind", got=got, allowed=f"be one of {', '.join(_SHARED)}", where=_WHERE, fix=fix))
    elif kind == "mxfp4":
        got, fix = "mxfp4 for whole weights", "pass q4_0, or read gpt-oss with from_hf(packed=True)"
        raise UsageError(word("kind", got=got, allowed="be of weights that are in MXFP4", where=_WHERE, fix=fix))


def _pieces(lm: LM, config: LMConfig, its: Architecture) -> Iterator[Piece]:
    """All tensors, of the model as llama.cpp has it."""
    if lm.config.quantized is not None:
        return packed_pieces(lm, config, its)
    return pieces(lm if config == lm.config else _with_silent(lm, config), its)


def _kind_of(folder: Path | None) -> str | None:
    """The model_type of the folder that a model came from."""
    if folder is None or not (folder / "config.json").is_file():
        return None
    return read_json(folder / "config.json", _WHERE).get("model_type")


def _with_silent(lm: LM, config: LMConfig) -> LM:
    """The model with the parts that its architecture cannot be without, which add nothing."""
    whole = empty(config, lm.embedding.dtype)
    with torch.no_grad():
        for name, tensor in whole.state_dict().items():
            tensor.fill_(silence(name))
        whole.load_state_dict(lm.state_dict(), strict=False)
    return whole


def _library() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        fix = "pip install 'turnout[gguf]'"
        raise UsageError(word("the package gguf", got="none", allowed="be installed", where=_WHERE, fix=fix)) from error


def _file_type(gguf: Any, kind: Kind) -> int:
    names = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    names["mxfp4"] = "MOSTLY_MXFP4_MOE"
    return int(gguf.LlamaFileType[names[kind]])


def _type_of(gguf: Any, piece: Piece, kind: Kind) -> Any:
    """The type that a tensor is stored in."""
    types = gguf.GGMLQuantizationType
    if piece.exact or kind == "f32":
        return types.F32
    if kind == "q4_0" and piece.name in ("token_embd.weight", "output.weight"):
        kind = "q8_0"
    if kind == "mxfp4" and piece.packed is None:
        return {torch.bfloat16: types.BF16, torch.float16: types.F16}.get(piece.dtype, types.F32)
    block = gguf.GGML_QUANT_SIZES[types[kind.upper()]][0]
    return types.F32 if piece.shape[-1] % block else types[kind.upper()]


def _write(writer: Any, parts: list[tuple[Piece, Any]], path: Path, moved: list[float]) -> None:
    """Writes all of it; ``moved`` gets by how much each tensor's scales were rounded."""
    writer.write_header_to_file(path)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece, chosen in parts:
            if piece.packed is not None and chosen.name != "F32":
                blocks = Blocks.of(piece.packed(), chosen.name.lower(), piece.name)
                moved.append(blocks.moved)
                writer.write_tensor_data(blocks.data)
            else:
                writer.write_tensor_data(_stored(piece, chosen))
    finally:
        writer.close()


@torch.no_grad()
def _stored(piece: Piece, chosen: Any) -> np.ndarray:
    """The bytes of one tensor, made just before they are written."""
    made = piece.make() if piece.packed is None else piece.packed().dequantised()
    wide = made.detach().to("cpu", torch.float32).contiguous().numpy()
    assert wide.shape == piece.shape
    if not np.isfinite(wide).all():
        fix = "write a sound model: this one gives no finite logits"
        raise UsageError(
            word(piece.name, got="numbers that are not finite", allowed="be finite", where=_WHERE, fix=fix)
        )
    if chosen.name == "F32":
        return wide
    limit, most = _MOST[chosen.name], float(np.abs(wide).max(initial=0))
    if most > limit:
        got, allowed = f"numbers up to {most:g}", f"be below {limit:g} in {chosen.name.lower()}"
        fix = "write it as f32" if chosen.name == "BF16" else "write it as bf16, or f32"
        raise UsageError(word(piece.name, got=got, allowed=allowed, where=_WHERE, fix=fix))
    quantize = importlib.import_module("gguf.quants").quantize
    return quantize(wide, chosen).view(np.uint8)
