"""Files of weights, zipped and unzipped: a container whose tensors are read one at a time, each piece checked."""

import base64
import dataclasses
import itertools
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from turnout.errors import CheckpointError, word
from turnout.models.zipnn.planes import CODES, decode, encode
from turnout.reading import Refuse, check_fields, check_safetensors, open_regular, parse_json
from turnout.storage import check_seal, create, digest, flush, read_error, sealed

__all__ = ["END", "Zipped", "ZippedFile", "plain_or_zipped", "unzip", "zip_weights"]

END = ".zipnn"
_FORMAT = "turnout.zipnn/1"
_MAGIC = b"turnout.zipnn\n"
# So many bytes are coded at once.
_CHUNK = 1 << 20
_HEADER_BYTES = 1 << 30
_WIDTH = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
_TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def plain_or_zipped(path: Path) -> Path:
    """The file, or where it is not there and a zipped one is, that.

    >>> plain_or_zipped(Path("no/such.safetensors")).name
    'such.safetensors'

    Source: none; plain bookkeeping.
    """
    twin = path.with_name(path.name + END)
    return twin if not path.exists() and twin.is_file() else path


@dataclasses.dataclass(frozen=True)
class Zipped:
    """What became of a file.

    Args:
        before_bytes: its size.
        after_bytes: that of the zipped one.

    >>> Zipped(100, 67).share
    0.67

    Source: none; plain bookkeeping.
    """

    before_bytes: int
    after_bytes: int

    @property
    def share(self) -> float:
        """What is left of it."""
        return self.after_bytes / self.before_bytes


def zip_weights(source: str | Path, target: str | Path) -> Zipped:
    """Writes a safetensors file in fewer bytes; ``unzip`` gives the very same file back.

    Args:
        source: the file; only read.
        target: the zipped one; must not exist. By custom the same name with ``.zipnn`` behind it, which ``from_hf``
            and ``load`` read where the file itself is not there.

    Raises:
        CheckpointError: not a whole safetensors file.
        StorageError: it cannot be read or written.

    Source: as ``encode``; the container is our own.
    """
    source, target = Path(source), Path(target)

    def refuse(problem: str) -> CheckpointError:
        got, fix = f"{source} ({problem})", "copy or download it again"
        return CheckpointError(word("the weights", got=got, allowed="be safetensors", where="zip_weights", fix=fix))

    aside = target.with_name(target.name + ".part")
    try:
        check_safetensors(source, refuse, any_link=True)
        with safe_open(source, "pt"):  # which sees that it is whole
            pass
        with open_regular(source, any_link=True) as file, create(aside) as out:
            body = _zip(file, out, digest(source), source.stat().st_size)
            text = json.dumps(sealed(body)).encode()
            packed = zlib.compress(text)
            out.write(packed + len(packed).to_bytes(8, "little"))
        flush(aside)
        if target.exists():
            raise FileExistsError(17, "File exists", str(target))
        aside.replace(target)
    except SafetensorError as error:
        raise refuse(str(error)) from error
    except OSError as error:
        raise read_error(error, target, "zip_weights") from error
    finally:
        aside.unlink(missing_ok=True)
    return Zipped(source.stat().st_size, target.stat().st_size)


def _zip(file: Any, out: BinaryIO, sha256: str, size: int) -> dict[str, object]:
    """Writes all streams, and gives what says where they are."""
    lead = file.read(8)
    head = file.read(int.from_bytes(lead, "little"))
    out.write(_MAGIC)
    entries = {name: one for name, one in json.loads(head).items() if name != "__metadata__"}
    chunks: dict[str, list[list[object]]] = {}
    for name, one in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        width, left, found = _WIDTH.get(one["dtype"], 1), one["data_offsets"][1] - one["data_offsets"][0], []
        while left:
            raw = file.read(min(left, _CHUNK))
            left -= len(raw)
            streams = encode(raw, width)
            found.append([len(raw), zlib.crc32(raw), out.tell(), [[code, len(stream)] for code, stream in streams]])
            for _, stream in streams:
                out.write(stream)
        chunks[name] = found
    return {
        "format": _FORMAT,
        "sha256_of_file": sha256,
        "bytes": size,
        "head": base64.b85encode(lead + head).decode(),
        "chunks": chunks,
    }


def unzip(source: str | Path, target: str | Path) -> None:
    """Writes the file that was zipped, byte for byte.

    Args:
        source: the zipped one; only read.
        target: the file; must not exist.

    Raises:
        CheckpointError: it is damaged.
        StorageError: it cannot be read or written.

    Source: as ``zip_weights``.
    """
    target = Path(target)
    aside = target.with_name(target.name + ".part")
    try:
        with ZippedFile(source) as file, create(aside) as out:
            out.write(file.head)
            for name in file.in_order():
                for piece in file.pieces(name):
                    out.write(piece.tobytes())
            sha256 = file.sha256
        flush(aside)
        if digest(aside) != sha256:
            raise _damaged(Path(source), "another SHA-256 than the file had")
        if target.exists():
            raise FileExistsError(17, "File exists", str(target))
        aside.replace(target)
    except OSError as error:
        raise read_error(error, target, "unzip") from error
    finally:
        aside.unlink(missing_ok=True)


def _damaged(path: Path, problem: str) -> CheckpointError:
    got, fix = f"{path} ({problem})", "copy it again, or zip the file once more"
    return CheckpointError(word("the weights", got=got, allowed="be whole", where="unzip", fix=fix))


def _check_pieces(pieces: object, offsets: list[int], refuse: Refuse) -> None:
    """Refuses pieces that are none, or not as long together as the tensor."""
    total = 0
    for piece in pieces if isinstance(pieces, list) else [None]:
        numbers = piece[:3] if isinstance(piece, list) and len(piece) == 4 else [None]
        streams = piece[3] if isinstance(piece, list) and len(piece) == 4 else None
        sound = all(type(number) is int and number >= 0 for number in numbers) and isinstance(streams, list)
        sound = sound and numbers[0] <= _CHUNK and len(streams) in (1, 2, 4, 8)  # pyrefly: ignore
        sound = sound and all(
            isinstance(one, list) and len(one) == 2 and one[0] in CODES and type(one[1]) is int and one[1] >= 0
            for one in streams  # pyrefly: ignore
        )
        if not sound:
            raise refuse("a piece that is none")
        total += numbers[0]  # pyrefly: ignore
    if len(offsets) != 2 or total != offsets[1] - offsets[0]:
        raise refuse(f"pieces of {total} bytes")


class ZippedFile:
    """A zipped file, its tensors unzipped one at a time: what ``safetensors.safe_open`` gives, of a zipped one.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is damaged.

    Source: as ``zip_weights``.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._file = open_regular(self._path, any_link=True)
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def _read(self) -> None:
        def refuse(problem: str) -> CheckpointError:
            return _damaged(self._path, problem)

        end = self._file.seek(0, 2)
        if end < len(_MAGIC) + 8 or self._at(0, len(_MAGIC)) != _MAGIC:
            raise refuse("no file of this kind, or cut off")
        size = int.from_bytes(self._at(end - 8, 8), "little")
        if size > end - 8 - len(_MAGIC):
            raise refuse("cut off")
        try:
            work = zlib.decompressobj()
            text = work.decompress(self._at(end - 8 - size, size), _HEADER_BYTES).decode()
        except (zlib.error, UnicodeDecodeError) as error:
            raise refuse(str(error)) from error
        body = parse_json(text, refuse)
        check_seal(body, refuse)
        kinds = {"format": str, "sha256_of_file": str, "bytes": int, "head": str, "chunks": dict[str, list]}
        check_fields(body, kinds, refuse)
        if body["format"] != _FORMAT:
            raise refuse(f"of the format {body['format']!r:.40}")
        self.sha256, self.bytes = body["sha256_of_file"], body["bytes"]
        try:
            self.head = base64.b85decode(body["head"])
        except ValueError as error:
            raise refuse(str(error)) from error
        entries = parse_json(self.head[8:].decode(), refuse)
        self._metadata = entries.pop("__metadata__", None)
        for name, one in entries.items():
            fields = {"dtype": str, "shape": list[int], "data_offsets": list[int]}
            check_fields(one if isinstance(one, dict) else {}, fields, refuse)
            _check_pieces(body["chunks"].get(name), one["data_offsets"], refuse)
        self._entries: Mapping[str, Any] = entries
        self._chunks: Mapping[str, list[Any]] = body["chunks"]

    def _at(self, place: int, size: int) -> bytes:
        self._file.seek(place)
        return self._file.read(size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self._entries)

    def in_order(self) -> list[str]:
        """The names in the order of the file."""
        return sorted(self._entries, key=lambda name: self._entries[name]["data_offsets"])

    def metadata(self) -> dict[str, str] | None:
        """What the file says of itself."""
        return self._metadata

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The bytes of a tensor, each piece checked.

        Raises:
            CheckpointError: one is damaged.
        """
        for size, crc, place, streams in self._chunks[name]:
            ends = list(itertools.accumulate((length for _, length in streams), initial=place))
            read = [(code, self._at(at, length)) for (code, length), at in zip(streams, ends, strict=False)]
            try:
                found = decode(read, size)
            except CheckpointError as error:
                raise _damaged(self._path, f"{name}: {error}") from error
            if zlib.crc32(found.data) != crc:
                raise _damaged(self._path, f"{name}: another checksum than was written")
            yield found

    def get_slice(self, name: str) -> "_Header":
        """The dtype and shape of a tensor."""
        return _Header(self._entries[name]["dtype"], list(self._entries[name]["shape"]))

    def get_tensor(self, name: str) -> Tensor:
        """A tensor, unzipped into memory of its own.

        Raises:
            CheckpointError: it is damaged.
        """
        kind, shape = self._entries[name]["dtype"], self._entries[name]["shape"]
        if kind not in _TORCH:
            raise _damaged(self._path, f"{name} is of {kind}")
        parts = list(self.pieces(name))
        dtype = _TORCH[kind]
        if sum(map(len, parts)) != math.prod(shape) * dtype.itemsize:
            raise _damaged(self._path, f"{name} has another size than its shape")
        if not parts:
            return torch.empty(shape, dtype=dtype)
        whole = np.concatenate(parts)
        return torch.from_numpy(whole).view(dtype).reshape(shape)


@dataclasses.dataclass(frozen=True)
class _Header:
    dtype: str
    shape: list[int]

    def get_dtype(self) -> str:
        return self.dtype

    def get_shape(self) -> list[int]:
        return self.shape
