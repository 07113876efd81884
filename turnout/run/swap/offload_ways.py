"""The ways between device, host and disk, and the host's own steps: a thread each, in the order that they are told."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from turnout.run.blocks.wire import Slow
from turnout.run.swap.homes import Home
from turnout.run.swap.swap_file import Meter, size_of

__all__ = ["Shape", "Slowed", "Ways"]

_LANES = ("up", "down", "host", "read", "write")
_NOT = Slow()
Shape = tuple[torch.Size, tuple[int, ...], torch.dtype]  # with its strides


@dataclasses.dataclass(frozen=True)
class Slowed:
    """How much longer each way is made to take, by its bytes; for trials of plans on one machine.

    Args:
        up: from the host to the device.
        down: from the device to the host.
        read: from disk to the host.
        write: from the host to disk.

    >>> Slowed(up=Slow(0.0, 1e-6)).up(1000)
    0.001

    Source: none; the alpha-beta model of Hockney, 1994.
    """

    up: Slow = _NOT
    down: Slow = _NOT
    read: Slow = _NOT
    write: Slow = _NOT


class Ways:
    """Five threads: to the device and from it, the optimizer's steps on the host, from the disk and to it.

    Args:
        device: its own queues are used beside the default one, where it has any.
        slow: ways made slower.
        host: is told the bytes of gradients on the host.
        gradients: is told those on the device.

    >>> ways = Ways(torch.device("cpu"), Slowed(), host=Meter(), gradients=Meter())
    >>> ways.bring([torch.ones(2), None]).result()
    [tensor([1., 1.]), None]
    >>> ways.close()

    Source: Liao et al., 2024, "Adding NVMe SSDs to Enable and Accelerate 100B Model Fine-tuning on a Single GPU".
    """

    def __init__(self, device: torch.device, slow: Slowed, *, host: Meter, gradients: Meter) -> None:
        self.device, self.slow, self.host, self.gradients = device, slow, host, gradients
        self._lanes = {name: ThreadPoolExecutor(1, thread_name_prefix=f"turnout-{name}") for name in _LANES}
        self._side = {name: torch.cuda.Stream(device) for name in _LANES[:2] if device.type == "cuda"}

    def fetch(self, home: Home, shapes: Sequence[Shape]) -> Future[list[Tensor]]:
        """A block's parameters on their way to the device; their room there is taken at once."""
        target = [torch.empty_strided(shape, at, dtype=dtype, device=self.device) for shape, at, dtype in shapes]
        read = self._lanes["read"].submit(self._read, home) if home.on_disk else None
        return self._lanes["up"].submit(self._up, home, read, target, self._now())

    def bring(self, gradients: list[Tensor | None]) -> Future[list[Tensor | None]]:
        """A block's gradients on their way to the host; the list is emptied once they are there."""
        size = _bytes(gradients)
        self.gradients.add(size)
        return self._lanes["down"].submit(self._down, gradients, size, self._now())

    def step(self, home: Home, down: Future[list[Tensor | None]]) -> Future[None]:
        """A block's step once its gradients are there, with what that reads from disk and writes to it."""
        read = self._lanes["read"].submit(self._fetch, home) if home.on_disk else None
        stepped = self._lanes["host"].submit(self._step, home, down, read)
        return self._lanes["write"].submit(self._store, home, stepped) if home.on_disk else stepped

    def close(self) -> None:
        """Ends the threads once they have done what they were told."""
        for lane in self._lanes.values():
            lane.shutdown(wait=True)

    def _now(self) -> Any:
        """Where the device's own queue is; None of a device without one."""
        return torch.cuda.current_stream(self.device).record_event() if self._side else None

    @contextlib.contextmanager
    def _beside(self, lane: str, event: Any) -> Iterator[None]:
        """A queue of the device beside its own, behind an event of that; done when this is left."""
        if event is None:
            yield
            return
        with torch.cuda.stream(self._side[lane]):
            self._side[lane].wait_event(event)
            yield
            self._side[lane].synchronize()

    def _up(self, home: Home, read: Future[list[Tensor]] | None, target: list[Tensor], event: Any) -> list[Tensor]:
        values = home.values() if read is None else read.result()
        with self._beside("up", event):
            for place, value in zip(target, values, strict=True):
                place.copy_(value)
        self.slow.up.sleep(home.bytes)
        home.release()
        return target

    def _read(self, home: Home) -> list[Tensor]:
        values = home.values()
        self.slow.read.sleep(home.bytes)
        return values

    def _down(self, gradients: list[Tensor | None], size: int, event: Any) -> list[Tensor | None]:
        self.host.add(size)
        with self._beside("down", event):
            found = [None if gradient is None else gradient.to("cpu", copy=True) for gradient in gradients]
        gradients.clear()
        self.slow.down.sleep(size)
        self.gradients.add(-size)
        return found

    def _fetch(self, home: Home) -> None:
        self.slow.read.sleep(home.fetch())

    def _step(self, home: Home, down: Future[list[Tensor | None]], read: Future[None] | None) -> None:
        gradients = down.result()
        if read is not None:
            read.result()
        size = _bytes(gradients)
        home.step(gradients)
        self.host.add(-size)

    def _store(self, home: Home, stepped: Future[None]) -> None:
        stepped.result()
        self.slow.write.sleep(home.store())


def _bytes(gradients: Sequence[Tensor | None]) -> int:
    return size_of([gradient for gradient in gradients if gradient is not None])
