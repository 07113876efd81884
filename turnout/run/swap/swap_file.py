"""A file that tensors are put into when there is no memory for them, and read back from, the same to the bit."""

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from turnout.errors import StorageError, word

__all__ = ["Meter", "SwapFile", "size_of"]

_ALIGN = 64  # bytes; whatever number a tensor is of begins where it may


class Meter:
    """Counts bytes that are held, now and at most; several threads may tell it.

    >>> meter = Meter()
    >>> meter.add(3), meter.add(-2), meter.now, meter.peak
    (None, None, 1, 3)

    Source: none; plain bookkeeping.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        """So many bytes more, or less where it is negative."""
        with self._lock:
            self.now += size
            self.peak = max(self.peak, self.now)


def size_of(tensors: Sequence[Tensor]) -> int:
    """The bytes of all their numbers.

    >>> size_of([torch.zeros(3), torch.zeros(2, dtype=torch.int64)])
    28
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class SwapFile:
    """Tensors in one flat file, their bytes as they lie; what they are and the file's hash stay in memory.

    It is room to put things, and no checkpoint: it means nothing to another process.

    Args:
        path: the file; whatever is there is written over.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = SwapFile(Path(folder, "block"))
    ...     size = file.write([torch.ones(2), torch.tensor(3)])
    ...     file.read()
    [tensor([1., 1.]), tensor(3)]

    Source: none; a flat file with SHA-256 of its bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kinds: list[tuple[torch.Size, tuple[int, ...], torch.dtype]] | None = None
        self._digest = b""

    @property
    def written(self) -> bool:
        """Whether anything was put into it."""
        return self._kinds is not None

    def write(self, tensors: Sequence[Tensor]) -> int:
        """Puts them there in place of what was there; how many bytes they are.

        Raises:
            StorageError: the disk is full, or the file cannot be written.
        """
        found, dense = hashlib.sha256(), [torch.empty_like(each).copy_(each.detach()) for each in tensors]
        try:
            with self.path.open("wb") as file:
                for tensor in dense:
                    body = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().tobytes()
                    body += b"\0" * (-len(body) % _ALIGN)
                    found.update(body)
                    file.write(body)
        except OSError as error:
            raise self._wrong(error.strerror or "not writable", "be written", "name a folder with room") from error
        self._kinds = [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in dense]
        self._digest = found.digest()
        return size_of(tensors)

    def read(self) -> list[Tensor]:
        """What was put there last.

        Raises:
            StorageError: the file is gone, or holds other bytes than were written.
        """
        assert self._kinds is not None, "something was written first"
        sizes = [shape.numel() * dtype.itemsize for shape, _, dtype in self._kinds]
        body = bytearray(sum(size + -size % _ALIGN for size in sizes))
        try:
            with self.path.open("rb") as file:
                read = file.readinto(body)
                more = file.read(1)
        except OSError as error:
            fix = "leave the folder alone while the model trains"
            raise self._wrong(error.strerror or "not readable", "be readable", fix) from error
        if read != len(body) or more or hashlib.sha256(body).digest() != self._digest:
            fix = "look at the disk's health, and start again from the last checkpoint"
            raise self._wrong("other bytes", "hold what was written to it", fix)
        whole = torch.frombuffer(body, dtype=torch.uint8) if body else torch.empty(0, dtype=torch.uint8)
        tensors, at = [], 0
        for size, (shape, stride, dtype) in zip(sizes, self._kinds, strict=True):
            part = whole[at : at + size].view(dtype)
            tensors.append(part.as_strided(shape, stride, part.storage_offset()))
            at += size + -size % _ALIGN
        return tensors

    def _wrong(self, got: str, allowed: str, fix: str) -> StorageError:
        what = f"the swap file {self.path}"
        return StorageError(word(what, got=got, allowed=allowed, where="turnout.run.swap.offload", fix=fix))
