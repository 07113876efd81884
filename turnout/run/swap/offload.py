"""Blocks that take turns on the device: parameters and optimizer state wait in the host's memory or on disk."""

import collections
import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from turnout.errors import TrainingError, UsageError, word
from turnout.run.swap.homes import Build, Home
from turnout.run.swap.offload_ways import Slowed, Ways
from turnout.run.swap.swap_file import Meter
from turnout.solve.paging import Turn, paging
from turnout.types import OffloadPlan

__all__ = ["Offloaded"]

_WHERE = "turnout.run.swap.offload"
T = TypeVar("T")


class Offloaded:
    """A model whose blocks are on the device for their turns alone, trained and run as the plan says.

    Fetches, gradients on their way down, optimizer steps and the disk's two ways each have a thread of their own. A
    block is stepped on the host as soon as its gradients are there, while the backward pass goes on below it, and no
    block is used before it was stepped: the numbers are those of plain training, to the bit on one kind of device.
    Between steps the blocks' parameters are empty, so that who reads them then sees it; ``close`` brings them back.

    On a machine without an accelerator the device is a second place in the same memory, whose bytes are counted.

    Args:
        model: on the device, all of it or what is no block; trained in place.
        plan: what is where.
        build: gives the optimizer of some parameters, once for each block and once for the rest: one that steps each
            parameter by itself, such as ``lambda own: AdamW(own, lr=1e-3)``. What clips the norm of all gradients
            does not go with this.
        blocks: the model's blocks in the order in which it calls them, each once a pass; ``model.blocks`` unless given.
        folder: where what the plan keeps on disk goes; a temporary folder unless given.
        slow: ways made slower.

    Raises:
        UsageError: a model without blocks, a parameter that two of them share or that is used outside too, or that is
            no plain tensor; a plan for other blocks.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    >>> with Offloaded(model, OffloadPlan(), lambda own: torch.optim.SGD(own, lr=0.1), blocks=list(model)) as off:
    ...     loss = off.step(lambda: model(torch.ones(1, 4)).sum())
    ...     off.parameters.peak  # two of three blocks of 80 bytes
    160

    Source: Abbasi et al., 2024, "Superpipeline"; Liao et al., 2024, "Adding NVMe SSDs to Enable and Accelerate 100B
    Model Fine-tuning on a Single GPU" (Fuyou), whose swaps of activations are left out: they stay on the device.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: OffloadPlan,
        build: Build,
        *,
        blocks: Sequence[nn.Module] | None = None,
        folder: str | Path | None = None,
        slow: Slowed | None = None,
    ) -> None:
        self.model, self.plan = model, plan
        self.blocks = _blocks_of(model, blocks)
        plan.check(len(self.blocks), where=_WHERE)
        self.parameters, self.gradients, self.host = Meter(), Meter(), Meter()
        self._own = [list(block.parameters()) for block in self.blocks]
        # As they lie: a sum goes another way, and rounds otherwise, over numbers in another order.
        self._shapes = [[(p.shape, torch.empty_like(p).stride(), p.dtype) for p in own] for own in self._own]
        rest = _rest(model, self.blocks, self._own)
        self._device = next((p.device for p in [*rest, *self._own[0]]), torch.device("cpu"))
        self._stack = contextlib.ExitStack()
        if folder is None and plan.on_disk:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="turnout-"))
        self._homes = []
        for number, own in enumerate(self._own):
            path = Path(folder, f"block-{number}") if folder is not None and number in plan.on_disk else None
            self._homes.append(Home(own, build, self.host, path))
            _empty(own)
        trained = [p for p in rest if p.requires_grad]
        self._rest = build(trained) if trained else None
        self._ways = Ways(self._device, slow or Slowed(), host=self.host, gradients=self.gradients)
        self._turns: tuple[Turn, ...] = ()
        self._at, self._training, self._broken, self._closed = -1, False, False, False
        self._arriving: dict[int, Future[list[Tensor]]] = {}
        self._there: dict[int, int] = {}  # block -> its bytes
        self._steps: collections.deque[Future[Any]] = collections.deque()
        self._later: list[Callable[[], Future[Any]]] = []
        self._hooks: list[torch.autograd.graph.saved_tensors_hooks] = []
        for number, block in enumerate(self.blocks):
            before = block.register_forward_pre_hook(lambda _m, _a, number=number: self._forward(number))
            after = block.register_forward_hook(
                lambda _m, _a, out, number=number: self._forwarded(number, out), always_call=True
            )
            self._stack.callback(before.remove)
            self._stack.callback(after.remove)

    def __enter__(self) -> "Offloaded":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, to set their rates."""
        found = [home.optimizer for home in self._homes] + [self._rest]
        return [group for one in found if one is not None for group in one.param_groups]

    # ---- what is done with it

    def step(self, loss: Callable[[], Tensor]) -> Tensor:
        """One step: ``loss`` is called, what it gives is differentiated, and every parameter is stepped.

        Returns:
            The loss, detached.

        Raises:
            UsageError: the model was closed or a step failed before; blocks were called in another order.
        """
        count = len(self.blocks)
        self._begin([*range(count), *reversed(range(count))], training=True)
        try:
            with torch.enable_grad():
                value = loss()
            if self._at != count - 1:
                raise self._order(f"{self._at + 1} of {count}")
            value.backward()
            self._finish()
            if self._rest is not None:
                self._rest.step()
                self._rest.zero_grad()
        except BaseException:
            self._broken = True  # some blocks may have been stepped, and others not
            raise
        finally:
            self._end()
        return value.detach()

    def run(self, call: Callable[[], T]) -> T:
        """What ``call`` gives, which runs the model as often as it likes, without gradients."""
        self._begin(list(range(len(self.blocks))), training=False)
        try:
            with torch.no_grad():
                return call()
        finally:
            self._end()

    def values(self) -> dict[str, Tensor]:
        """Every parameter by its name, copied to the host: what a checkpoint holds of them."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        found = {name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters()}
        for own, home in zip(self._own, self._homes, strict=True):
            found |= {names[id(p)]: value.clone() for p, value in zip(own, home.values(), strict=True)}
            home.release()
        return found

    def close(self) -> None:
        """Brings all parameters back to the device, and ends the threads and the swap files."""
        if self._closed:
            return
        self._closed = True
        self._ways.close()
        for own, home in zip(self._own, self._homes, strict=True):
            for parameter, value in zip(own, home.values(), strict=True):
                parameter.data = value.to(self._device, copy=True)
            home.release()
            home.close()
        self._stack.close()

    # ---- a pass

    def _begin(self, uses: list[int], *, training: bool) -> None:
        if self._closed or self._broken:
            got = "it was closed" if self._closed else "a step failed halfway"
            fix = "build another" if self._closed else "start again from the last checkpoint"
            raise UsageError(word("the model", got=got, allowed="be in use", where=_WHERE, fix=fix))
        self._training = training
        self._plan_pass(uses, ())

    def _plan_pass(self, uses: list[int], held: Sequence[int]) -> None:
        plan = self.plan
        self._uses, self._at = uses, -1
        self._turns = paging(uses, capacity=plan.resident, ahead=plan.prefetch, held=held, spent=self._training)

    def _end(self) -> None:
        """Nothing is left on the device, and nothing is waited for."""
        while self._hooks:
            self._hooks.pop().__exit__(None, None, None)
        for arriving in self._arriving.values():
            arriving.exception()
        for step in self._steps:
            step.exception()
        self._arriving.clear()
        self._steps.clear()
        self._later.clear()
        for block in list(self._there):
            self._drop(block)
        self._turns, self._at = (), -1

    def _forward(self, number: int) -> None:
        """A block is about to be called."""
        count = len(self.blocks)
        if not self._turns:
            fix = "call the model inside step(lambda: ...) or run(lambda: ...)"
            got = "called by itself"
            raise UsageError(word("an offloaded model", got=got, allowed="be told", where=_WHERE, fix=fix))
        if self._at >= count and self._uses[self._at] == number:
            return  # computed once more for its backward pass, and there already
        if not self._training and self._at == count - 1 and number == 0:
            self._plan_pass(self._uses, tuple(self._there))
        if number != self._at + 1 or self._at >= count:
            raise self._order(f"block {number} after block {self._at}")
        self._enter(number)
        if self._training:
            whose = {p.untyped_storage().data_ptr(): (number, i) for i, p in enumerate(self._own[number]) if p.numel()}
            self._hooks.append(torch.autograd.graph.saved_tensors_hooks(_packed(whose), self._unpacked))
            self._hooks[-1].__enter__()

    def _forwarded(self, number: int, out: object) -> None:
        if self._hooks:
            self._hooks.pop().__exit__(None, None, None)
        if self._training and self._at == number:
            for tensor in _tensors(out):
                if tensor.requires_grad:
                    tensor.register_hook(lambda _, number=number: self._backward(number))

    def _backward(self, number: int) -> None:
        """The first gradient has come to a block's outputs."""
        turn = 2 * len(self.blocks) - 1 - number
        while self._at < turn:
            self._enter(self._at + 1)

    def _unpacked(self, saved: Any) -> Tensor:
        if isinstance(saved, _Saved):
            number, place = saved.whose
            if number not in self._there:
                raise UsageError(
                    word("a block's parameters", got="used when they are away", allowed="be used by it alone",
                         where=_WHERE, fix=f"make block {number} give what follows from them")
                )  # fmt: skip
            return self._own[number][place].data.as_strided(saved.shape, saved.stride, saved.offset)
        tensor, version = saved
        if tensor._version != version:
            got, fix = f"changed {tensor._version - version} times", "do not write into what a block keeps"
            raise TrainingError(word("a kept tensor", got=got, allowed="stay as it was", where=_WHERE, fix=fix))
        return tensor

    def _order(self, got: str) -> UsageError:
        fix = "pass blocks in the order in which the model calls them, each once"
        return UsageError(word("the blocks", got=got, allowed="be called in order", where=_WHERE, fix=fix))

    # ---- turns

    def _enter(self, at: int) -> None:
        """Turn ``at``: gives up, fetches, hands on what was just differentiated, and waits for what is used."""
        turn, self._at = self._turns[at], at
        spent = [block for block in turn.drops if self._uses[at - 1] == block and at > len(self.blocks)]
        taken = [(block, self._gradients(block)) for block in spent]
        for block in turn.drops:
            self._drop(block)
        for block in turn.loads:
            self._load(block)
        for block, gradients in taken:
            self._hand_on(block, gradients)
        used = self._uses[at]
        if used in self._arriving:
            for parameter, value in zip(self._own[used], self._arriving.pop(used).result(), strict=True):
                parameter.data = value

    def _finish(self) -> None:
        """Hands on the last block that was differentiated, and waits until every block was stepped."""
        if self._at >= len(self.blocks):
            last = self._uses[self._at]
            gradients = self._gradients(last)
            self._drop(last)
            self._hand_on(last, gradients)
        for one in self._later:
            self._steps.append(one())
        while self._steps:
            self._steps.popleft().result()

    def _load(self, block: int) -> None:
        home = self._homes[block]
        self._there[block] = home.bytes
        self.parameters.add(home.bytes)
        self._arriving[block] = self._ways.fetch(home, self._shapes[block])

    def _drop(self, block: int) -> None:
        arriving = self._arriving.pop(block, None)
        if arriving is not None:
            arriving.result()
        _empty(self._own[block])
        self.parameters.add(-self._there.pop(block))

    def _gradients(self, block: int) -> list[Tensor | None]:
        found = [parameter.grad for parameter in self._own[block]]
        for parameter in self._own[block]:
            parameter.grad = None
        return found

    def _hand_on(self, block: int, gradients: list[Tensor | None]) -> None:
        """Starts a block's gradients on their way; two blocks' at most are under way."""
        home = self._homes[block]
        if all(gradient is None for gradient in gradients):
            return
        while len(self._steps) > 1:
            self._steps.popleft().result()
        down = self._ways.bring(gradients)
        if self.plan.overlap:
            self._steps.append(self._ways.step(home, down))
        else:
            self._later.append(lambda: self._ways.step(home, down))
            self._steps.append(down)


@dataclasses.dataclass(frozen=True)
class _Saved:
    """A view of a block's parameter that its backward pass needs, without its numbers."""

    whose: tuple[int, int]
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _packed(whose: Mapping[int, tuple[int, int]]) -> Callable[[Tensor], Any]:
    def pack(tensor: Tensor) -> Any:
        found = whose.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        if found is None:
            return tensor, tensor._version
        return _Saved(found, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    return pack


def _tensors(out: object) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, tuple | list):
        for each in out:
            yield from _tensors(each)
    elif isinstance(out, Mapping):
        yield from _tensors(list(out.values()))
    elif dataclasses.is_dataclass(out) and not isinstance(out, type):
        yield from _tensors([getattr(out, field.name) for field in dataclasses.fields(out)])


def _empty(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.new_empty(0)


def _blocks_of(model: nn.Module, blocks: Sequence[nn.Module] | None) -> list[nn.Module]:
    found = getattr(model, "blocks", None) if blocks is None else blocks
    if not isinstance(found, Sequence | nn.ModuleList) or not len(found):
        fix = "pass blocks=[...], in the order in which the model calls them"
        got = f"{type(model).__name__} without them" if found is None else "none"
        raise UsageError(word("the blocks", got=got, allowed="be a list of modules", where=_WHERE, fix=fix))
    return list(found)


def _rest(model: nn.Module, blocks: Sequence[nn.Module], own: Sequence[Sequence[nn.Parameter]]) -> list[nn.Parameter]:
    """What belongs to no block; refuses what cannot be moved block by block."""
    inside = {id(p) for each in own for p in each}
    within = {id(module) for block in blocks for module in block.modules()}
    outside = {
        id(p) for module in model.modules() if id(module) not in within for p in module.parameters(recurse=False)
    }
    count = collections.Counter(id(p) for each in own for p in each)
    for name, parameter in model.named_parameters():
        if count[id(parameter)] > 1 or (id(parameter) in inside and id(parameter) in outside):
            fix = "untie it, or offload a model whose blocks share nothing"
            raise UsageError(word("a block's parameters", got=name, allowed="be its own", where=_WHERE, fix=fix))
        if id(parameter) in inside and type(parameter.data) is not Tensor:
            got, fix = f"{name}, a {type(parameter.data).__name__}", "offload it before anything wraps it"
            raise UsageError(word("a block's parameters", got=got, allowed="be plain tensors", where=_WHERE, fix=fix))
    return [p for p in model.parameters() if id(p) not in inside]
