"""Where a block's parameters and optimizer state are kept while they are not on the device, and stepped there."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from turnout.run.swap.swap_file import Meter, SwapFile, size_of

__all__ = ["Build", "Home"]

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Home:
    """A block's parameters in the host's memory, or on disk, with the optimizer that steps them on the host.

    Args:
        parameters: the block's, as they are now; they are copied.
        build: gives the optimizer of those that are trained.
        meter: is told the bytes of host memory that this takes.
        path: where the two files go (with ``.parameters`` and ``.state`` behind it); None for memory.

    >>> home = Home([nn.Parameter(torch.ones(2))], lambda own: torch.optim.SGD(own, lr=1.0), Meter(), None)
    >>> home.step([torch.ones(2)])
    >>> home.values()
    [tensor([0., 0.])]

    Source: Ren et al., 2021, "ZeRO-Offload", for the step on the host.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], build: Build, meter: Meter, path: Path | None) -> None:
        self.host = [nn.Parameter(p.detach().to("cpu", copy=True), p.requires_grad) for p in parameters]
        self.trained = [p for p in self.host if p.requires_grad]
        self.optimizer = build(self.trained) if self.trained else None
        self.bytes = size_of(self.host)
        self.on_disk = path is not None
        self._meter, self._state_bytes = meter, 0
        if path is None:
            meter.add(self.bytes)
            return
        self._parameters, self._state = SwapFile(path.with_suffix(".parameters")), SwapFile(path.with_suffix(".state"))
        self._parameters.write(self.host)
        self._empty()

    def values(self) -> list[Tensor]:
        """The parameters' numbers in the host's memory; of a file, others each time, which ``release`` gives up."""
        if not self.on_disk:
            return [p.detach() for p in self.host]
        self._meter.add(self.bytes)
        return self._parameters.read()

    def release(self) -> None:
        """Nobody needs what ``values`` gave any longer."""
        if self.on_disk:
            self._meter.add(-self.bytes)

    def fetch(self) -> int:
        """Reads parameters and state from disk, to step them; how many bytes."""
        self._meter.add(self.bytes)
        for parameter, value in zip(self.host, self._parameters.read(), strict=True):
            parameter.data = value
        state = self._tensors()
        if self._state.written:
            self._meter.add(self._state_bytes)
            for tensor, value in zip(state, self._state.read(), strict=True):
                tensor.data = value
        return self.bytes + self._state_bytes

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """One step of the optimizer; gradients are those of all parameters, None of those that got none."""
        for parameter, gradient in zip(self.host, gradients, strict=True):
            parameter.grad = gradient
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        found = size_of(self._tensors())
        self._meter.add(found - self._state_bytes)
        self._state_bytes = found

    def store(self) -> int:
        """Writes both back to disk and gives up their memory; how many bytes."""
        written = self._parameters.write(self.host) + self._state.write(self._tensors())
        self._empty()
        self._meter.add(-self.bytes - self._state_bytes)
        return written

    def _tensors(self) -> list[Tensor]:
        """What the optimizer keeps, but for its counts of steps: those stay."""
        kept = [] if self.optimizer is None else [self.optimizer.state[p] for p in self.trained]
        return [value for each in kept for value in each.values() if isinstance(value, Tensor) and value.ndim]

    def _empty(self) -> None:
        for tensor in [*self.host, *self._tensors()]:
            tensor.data = tensor.data.new_empty(0)

    def close(self) -> None:
        """Gives up the memory, or deletes the files."""
        if self.on_disk:
            for file in (self._parameters, self._state):
                file.path.unlink(missing_ok=True)
        else:
            self._meter.add(-self.bytes - self._state_bytes)
