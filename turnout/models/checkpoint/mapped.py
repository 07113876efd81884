"""A safetensors file whose tensors are read one at a time, so that what was read takes no memory any more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from turnout.errors import TurnoutError

__all__ = ["MappedFile"]

# The pages of a mapped file count as the process's own from when they are read to when it is mapped no more: after so
# many bytes it is mapped anew.
_ONCE = 1 << 25


class MappedFile:
    """What ``safetensors.safe_open`` gives, in the memory of the tensors that are in use and 32 MiB of others.

    Args:
        path: the file.
        refuse: words what is wrong with it.

    Raises:
        SafetensorError: not a whole safetensors file.
        OSError: it cannot be read.

    Source: none; plain bookkeeping.
    """

    def __init__(self, path: Path, refuse: Callable[[str], TurnoutError]) -> None:
        self._path, self._refuse, self._read = path, refuse, 0
        self._seen, self._file = _state(path), safe_open(path, framework="pt", device="cpu")

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self._file.keys())

    def get_slice(self, name: str) -> Any:
        """The dtype and shape of a tensor."""
        return self._file.get_slice(name)

    def get_tensor(self, name: str) -> Tensor:
        """A tensor; it lies in the file as long as it is held, so copy what is to stay.

        Raises:
            TurnoutError: the file is no longer the one that was opened; what ``refuse`` words.
        """
        if self._read >= _ONCE:
            self._file, self._read = safe_open(self._path, framework="pt", device="cpu"), 0
            if _state(self._path) != self._seen:
                raise self._refuse("changed while it was read")
        tensor = self._file.get_tensor(name)
        self._read += tensor.nbytes
        return tensor


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file does."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
