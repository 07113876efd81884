"""Claim: coded by their place in a number, bytes of weights are a third fewer, and not a bit is lost."""

import zlib

import numpy as np
import torch
from torch import Tensor

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.taught import EXPERTS, STEPS, TOP_K, taught
from turnout.models.zipnn import decode, encode

# What the abstract says: 33 % saved, at times over 50 %, and 17 % better than vanilla compression.
_LEFT, _HALF, _BETTER = 0.67, 0.5, 0.83
_CHUNK = 1 << 20


def zipnn() -> Claim:
    """Bytes grouped by their place in a number and coded each by its own, against one code for bytes as they lie.

    >>> zipnn().off
    'bytes as they lie, in one stream, by the same code'

    Source: Hershcovitch et al., 2024, "ZipNN: Lossless Compression for AI Models".
    """
    return Claim(
        name="zipnn",
        statement="Weights whose exponents are coded apart from their mantissas take fewer bytes, none of their bits "
        "lost, than when bytes are coded as they lie.",
        source="Hershcovitch et al., 2024, ZipNN: Lossless Compression for AI Models",
        off="bytes as they lie, in one stream, by the same code",
        switched={"grouped": "as they lie", "grouped, fp32": "as they lie, fp32"},
        rows=(
            Row("share of bytes left, bf16", "below", "grouped", "as they lie", "one stream, the same code"),
            Row("share of bytes left, fp32", "below", "grouped, fp32", "as they lie, fp32", "one stream, same code"),
            Row("share of bytes left, bf16", "within", "grouped", "zlib", "zlib", bound=_LEFT, headline=True),
            Row("share left, over zlib's, bf16", "within", "of zlib", "zlib of zlib", "zlib", bound=_BETTER,
                headline=True),
            Row("share of bytes left, fp32 that was bf16", "within", "clean", "grouped, fp32", "fp32 as it was trained",
                bound=_HALF, headline=True),
            Row("share of bytes changed when unzipped", "within", "changed", "changed by fp8", "weights in fp8",
                bound=0.0, headline=True),
        ),
        measure=_measure,
        seconds=11,
        note=f"all matrices of a model of 2 layers, width 64, {EXPERTS} experts, top {TOP_K}, after {STEPS} steps of "
        "1,024 tokens; zlib at level 6, which is also the code within ZipNN, there without matches",
    )  # fmt: skip


def _measure(seed: int) -> Values:
    whole = torch.cat(
        [tensor.detach().flatten() for tensor in taught(seed, routed=True).parameters() if tensor.ndim > 1]
    )
    short, clean = whole.bfloat16(), whole.bfloat16().float()
    grouped, lain, plain = _left(short, 2), _left(short, 1), _zlib(short)
    return {
        "grouped": grouped,
        "as they lie": lain,
        "zlib": plain,
        "of zlib": grouped / plain,
        "zlib of zlib": plain / plain,
        "grouped, fp32": _left(whole, 4),
        "as they lie, fp32": _left(whole, 1),
        "clean": _left(clean, 4),
        "changed": _changed(short),
        "changed by fp8": 0.5 * float((short.to(torch.float8_e4m3fn).bfloat16() != short).float().mean()),
    }


def _bytes(weights: Tensor) -> bytes:
    return weights.contiguous().view(torch.uint8).numpy().tobytes()


def _left(weights: Tensor, width: int) -> float:
    """The share of bytes left."""
    return sum(len(stream) for streams, _ in _coded(weights, width) for _, stream in streams) / weights.nbytes


def _coded(weights: Tensor, width: int) -> list[tuple[list[tuple[str, bytes]], bytes]]:
    """Piece by piece, what it is coded as, and the piece."""
    raw = _bytes(weights)
    pieces = [raw[at : at + _CHUNK] for at in range(0, len(raw), _CHUNK)]
    return [(encode(piece, width), piece) for piece in pieces]


def _changed(weights: Tensor) -> float:
    """The share of bytes that are others when they are unzipped."""
    wrong = [
        np.count_nonzero(decode(streams, len(piece)) != np.frombuffer(piece, np.uint8))
        for streams, piece in _coded(weights, 2)
    ]
    return sum(wrong) / weights.nbytes


def _zlib(weights: Tensor) -> float:
    raw = _bytes(weights)
    return len(zlib.compress(raw, 6)) / len(raw)
