"""Experts in the files of a checkpoint: where each one's numbers lie, and how they come into a slot."""

import dataclasses
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from turnout.errors import CheckpointError, word
from turnout.reading import check_safetensors, open_regular, parse_json
from turnout.run.swap import Part
from turnout.types import Packed

__all__ = ["ExpertFile", "FileExperts", "Piece", "Place", "Range"]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8,
    "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
_WHERE = "turnout.models.checkpoint.load_offloaded"
# Files are read, not mapped: what is cut off under a mapped file ends the process (SIGBUS), here it is an error.
_PREADV: Callable[[int, list[memoryview], int], int] | None = getattr(os, "preadv", None)


class ExpertFile:
    """A safetensors file that stays open: parts of its tensors are read by several threads at once.

    Args:
        path: the file.

    Raises:
        CheckpointError: not a whole safetensors file.
        OSError: it cannot be opened.

    Source: none; the file format of safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_safetensors(path, self.refuse)
        self._file: BinaryIO = open_regular(path, refuse=self.refuse)
        self._turn = threading.Lock()
        try:
            self._begin()
        except BaseException:
            self._file.close()
            raise

    def _begin(self) -> None:
        size = int.from_bytes(self._file.read(8), "little")
        self.header = parse_json(self._file.read(size), self.refuse)
        self._start, self._seen = 8 + size, self._state()
        end = max((self.header[name]["data_offsets"][1] for name in self.names), default=0)
        if self._seen[0] < self._start + end:
            raise self.refuse(f"{self._seen[0]:,} bytes where its header says {self._start + end:,}")

    def refuse(self, problem: str) -> CheckpointError:
        """What is wrong with it, as an error."""
        fix = "copy or download it again, and leave it alone while the model is used"
        allowed = "be a whole safetensors file, and stay as it is"
        got = f"{self.path} ({problem})"
        return CheckpointError(word("the experts' file", got=got, allowed=allowed, where=_WHERE, fix=fix))

    def _state(self) -> tuple[int, int]:
        """What changes when the open file does; another file in its place does not count."""
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    @property
    def names(self) -> list[str]:
        """Of its tensors."""
        return [name for name in self.header if name != "__metadata__"]

    def range(self, name: str) -> "Range":
        """Where a tensor lies.

        Raises:
            CheckpointError: it is of a dtype that no weights are of.
        """
        about = self.header[name]
        if about["dtype"] not in _DTYPES:
            raise self.refuse(f"{name} in {about['dtype']}")
        (start, end), shape, dtype = about["data_offsets"], tuple(about["shape"]), _DTYPES[about["dtype"]]
        if end - start != torch.Size(shape).numel() * dtype.itemsize:
            raise self.refuse(f"{end - start} bytes for {name} of shape {shape}")
        return Range(self, self._start + start, shape, dtype)

    def read(self, into: Tensor, offset: int) -> None:
        """Fills a contiguous tensor with the bytes from there.

        Raises:
            CheckpointError: there are not so many, or the file is no longer what it was.
        """
        view = into.view(-1).view(torch.uint8).numpy().data
        if self._state() != self._seen:
            raise self.refuse("changed while it is used")
        done = 0
        while done < len(view):
            try:
                count = self._some(view[done:], offset + done)
            except OSError as error:
                raise self.refuse(error.strerror or "not readable") from error
            if count <= 0:
                raise self.refuse("it ends early")
            done += count

    def _some(self, view: memoryview, offset: int) -> int:
        if _PREADV is not None:
            return _PREADV(self._file.fileno(), [view], offset)
        with self._turn:
            self._file.seek(offset)
            return self._file.readinto(view)  # pyrefly: ignore[missing-attribute] - a buffered file has it

    def close(self) -> None:
        """Gives up the file."""
        self._file.close()


@dataclasses.dataclass(frozen=True, eq=False)
class Range:
    """A tensor in a file, or a part of one: contiguous bytes."""

    file: ExpertFile
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, index: int) -> "Range":
        """One along the first axis."""
        size = torch.Size(self.shape[1:]).numel() * self.dtype.itemsize
        return Range(self.file, self.offset + index * size, self.shape[1:], self.dtype)

    @property
    def nbytes(self) -> int:
        """How many there are."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def tensor(self) -> Tensor:
        """The numbers."""
        found = torch.empty(self.shape, dtype=self.dtype)
        self.file.read(found, self.offset)
        return found

    def into(self, view: Tensor) -> None:
        """Writes the numbers there, which has as many: straight, where it lies as the file does."""
        if view.is_contiguous() and view.dtype == self.dtype:
            self.file.read(view, self.offset)
        else:
            view.copy_(self.tensor().view(view.shape))


@dataclasses.dataclass(frozen=True)
class Place:
    """A view of one part of an expert: which part, and its shape and strides there."""

    part: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, into: Sequence[Tensor]) -> Tensor:
        """The view, of the tensors of a slot."""
        whole = into[self.part]
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """What is read of an expert in one go.

    Args:
        ranges: the bytes: of a tensor as it is, or what ``decode`` takes.
        places: where it goes, or where codes and scales do.
        decode: makes few bits of what was read; None for numbers as they are.
    """

    ranges: tuple[Range, ...]
    places: tuple[Place, ...]
    decode: Callable[..., Packed] | None = None

    def read(self, into: Sequence[Tensor]) -> int:
        """Writes it to its places; how many bytes were read."""
        if self.decode is None:
            self.ranges[0].into(self.places[0].of(into))
        else:
            packed = self.decode(*(one.tensor() for one in self.ranges))
            for place, found in zip(self.places, (packed.code, packed.scale), strict=True):
                view = place.of(into)
                view.copy_(found.view(view.shape))
        return sum(one.nbytes for one in self.ranges)


class FileExperts:
    """The experts of a model in its files: an ``ExpertSource``.

    Args:
        parts: the tensors of an expert.
        pieces: what is to be read of each, by layer and expert.
        biases: of each layer the tensors (E, ...) of the parts that are no matrices, in memory.
        files: all that are read.

    Source: none; plain bookkeeping.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        pieces: Mapping[tuple[int, int], Sequence[Piece]],
        biases: Sequence[Sequence[Tensor]],
        files: Sequence[ExpertFile],
    ) -> None:
        self.parts = tuple(parts)
        self._pieces, self._biases, self._files = pieces, biases, files

    @torch.no_grad()
    def read(self, layer: int, expert: int, into: Sequence[Tensor]) -> int:
        """Writes one expert's tensors there; how many bytes were read.

        Raises:
            CheckpointError: a file ends early, cannot be read, or was changed.
        """
        size = sum(piece.read(into) for piece in self._pieces[layer, expert])
        if biases := self._biases[layer]:
            for slot, bias in zip(into[-len(biases) :], biases, strict=True):
                slot.copy_(bias[expert])
        return size

    def close(self) -> None:
        """Gives up the files."""
        for file in self._files:
            file.close()
