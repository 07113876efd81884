"""Weights in fewer bytes and not a bit lost (ZipNN): bytes of a kind together, each kind by a code of its own."""

import zlib
from collections.abc import Iterator

import numpy as np

from turnout.errors import CheckpointError, word

__all__ = ["CODES", "decode", "encode", "joined", "planes"]

CODES = ("raw", "huffman", "runs")
# The entropy, in bits a byte, above which bytes are left as they are.
_DENSE = 7.9
# From here on runs of one byte are worth looking for.
_ONE_BYTE = 0.9


def encode(raw: bytes | memoryview, width: int) -> list[tuple[str, bytes]]:
    """The bytes of floating-point numbers as streams, each with the name of its code: "raw", "huffman" or "runs".

    Every number is turned by one bit, so that its exponent fills the last byte and its sign joins the mantissa; then
    all first bytes, all second ones, ... make a stream each. Exponents take few values and need few bits; mantissas
    are as good as random and are left alone.

    Args:
        raw: the bytes, little-endian; not written to.
        width: bytes a number; 1 for bytes that mean something else.

    >>> found = encode(np.full(4096, 1.5, "<f4").tobytes(), 4)
    >>> [code for code, _ in found], sum(len(stream) for _, stream in found) < 256
    (['runs', 'runs', 'runs', 'runs'], True)

    Source: Hershcovitch et al., 2024, "ZipNN: Lossless Compression for AI Models". There Huffman's code is of their own
    library or of zstd; here it is zlib's, of the standard library, whose Huffman code has no matches to look for.
    """
    return [_coded(plane) for plane in planes(np.frombuffer(raw, np.uint8), width)]


def planes(byte_N: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """The bytes of each place in a number, all together; exponents in the last plane."""
    if width == 1:
        yield byte_N
        return
    number_N = byte_N.view(f"<u{width}")
    turned_N = (number_N << 1) | (number_N >> (8 * width - 1))
    byte_NW = turned_N.view(np.uint8).reshape(-1, width)
    for place in range(width):
        yield np.ascontiguousarray(byte_NW[:, place])


def joined(plane_W: list[np.ndarray]) -> np.ndarray:
    """The bytes that ``planes`` took apart; an array of their own."""
    width = len(plane_W)
    if width == 1:
        return plane_W[0].copy()
    turned_N = np.stack(plane_W, axis=1).reshape(-1).view(f"<u{width}")
    return ((turned_N >> 1) | (turned_N << (8 * width - 1))).view(np.uint8)


def _coded(plane: np.ndarray) -> tuple[str, bytes]:
    count_256 = np.bincount(plane, minlength=256)
    share = count_256[count_256 > 0] / max(plane.size, 1)
    if -(share * np.log2(share)).sum() > _DENSE or plane.size == 0:
        return "raw", plane.tobytes()
    often = share.max() > _ONE_BYTE
    work = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY if often else zlib.Z_HUFFMAN_ONLY)
    stream = work.compress(plane.tobytes()) + work.flush()
    if len(stream) >= plane.size:
        return "raw", plane.tobytes()
    return ("runs" if often else "huffman"), stream


def decode(streams: list[tuple[str, bytes]], size: int) -> np.ndarray:
    """The ``size`` bytes that ``encode`` was given, in an array of their own.

    Raises:
        CheckpointError: streams that are damaged, or not of so many bytes.

    >>> raw = np.arange(6, dtype="<f4").tobytes()
    >>> decode(encode(raw, 4), 24).tobytes() == raw
    True

    Source: as ``encode``.
    """
    wanted = size // len(streams)
    return joined([np.frombuffer(_decoded(code, stream, wanted), np.uint8) for code, stream in streams])


def _decoded(code: str, stream: bytes, wanted: int) -> bytes:
    whole, problem = True, ""
    if code != "raw":
        work = zlib.decompressobj(-15)
        try:
            stream = work.decompress(stream, wanted + 1)
        except zlib.error as error:
            problem = str(error)
        whole = work.eof and not work.unused_data
    if problem or not whole or len(stream) != wanted:
        got, fix = problem or f"{len(stream)} bytes, whole: {whole}", "copy the file again"
        raise CheckpointError(word("a stream", got=got, allowed=f"be {wanted} bytes", where="decode", fix=fix))
    return stream
