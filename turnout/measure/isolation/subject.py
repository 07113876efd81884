"""What is audited: a layer of experts over rows of numbers, or a model over rows of ids, called in one way."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.measure.observe import part_of

__all__ = ["Layer", "Model", "Subject", "routed_layers"]

_WHERE = "turnout.measure.audit"
_HOLDS = ("logits_BSV", "logits", "output", "last_hidden_state")


class Subject(Protocol):
    """Rows of some tokens in, an output for each of their tokens out."""

    name: str
    length: int

    def rows(self, count: int, chance: torch.Generator) -> Tensor:
        """So many random rows, (count, length, ...)."""
        ...

    def run(self, row_BS: Tensor) -> Tensor:
        """(B, S, ...) what comes out."""
        ...


class Layer:
    """A module that maps tokens to tokens of the same width, given as (B, S, D), or as (T, D) where it takes no other.

    Args:
        module: a layer of experts, or anything that is called so; may give its output first in a tuple.
        width: D.
        length: S, tokens a row.
        name: for the report.
        like: (N, S, D) rows of its true inputs to draw from; None for normal ones.

    >>> Layer(nn.Linear(4, 4), 4, name="a map").run(torch.zeros(2, 3, 4)).shape
    torch.Size([2, 3, 4])

    Source: none; plain bookkeeping.
    """

    def __init__(self, module: Any, width: int, *, length: int = 4, name: str = "", like: Tensor | None = None) -> None:
        self.module, self.width, self.length, self.name, self.like = module, width, length, name, like
        first = next((one for one in _tensors(module) if one.is_floating_point()), torch.empty(0))
        self.dtype, self.device = first.dtype, first.device
        self.flat = False

    def rows(self, count: int, chance: torch.Generator) -> Tensor:
        """So many rows of random tokens, or of true ones."""
        if self.like is not None:
            return self.like[torch.randint(len(self.like), (count,), generator=chance)]
        return torch.randn(count, self.length, self.width, generator=chance).to(self.device, self.dtype)

    def run(self, row_BSD: Tensor) -> Tensor:
        """(B, S, D)."""
        if not self.flat:
            try:
                return _found(self.module(row_BSD), row_BSD.shape[:2]).view(*row_BSD.shape[:2], -1)
            except (ValueError, RuntimeError, AssertionError):
                self.flat = True  # one that takes (T, D) alone; whatever else is wrong is raised below
        return _found(self.module(row_BSD.flatten(0, 1)), row_BSD.shape[:2]).view(*row_BSD.shape[:2], -1)


class Model:
    """A model over ids: ours, one of transformers, or any that gives logits.

    Args:
        module: the model.
        vocabulary: how many ids there are.
        length: S, ids a row.
        name: for the report.

    Source: none; plain bookkeeping.
    """

    def __init__(self, module: nn.Module, vocabulary: int, *, length: int = 12, name: str = "") -> None:
        self.module, self.vocabulary, self.length, self.name = module, vocabulary, length, name
        first = next((one for one in _tensors(module) if one.is_floating_point()), torch.empty(0))
        self.dtype, self.device = first.dtype, first.device
        self.pairs = bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))
        forward = getattr(module, "_forward", module.forward)
        self.masks = "attention_mask" in inspect.signature(forward).parameters

    def rows(self, count: int, chance: torch.Generator) -> Tensor:
        """So many rows of random ids."""
        return torch.randint(self.vocabulary, (count, self.length), generator=chance).to(self.device)

    def run(self, row_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """(B, S, V)."""
        known: dict[str, Any] = {} if mask_BS is None else {"attention_mask": mask_BS}
        if self.pairs:
            known["decoder_input_ids"] = row_BS
        return _found(self.module(row_BS, **known), row_BS.shape)


def _tensors(module: Any) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []


def _found(output: Any, shape: torch.Size) -> Tensor:
    """(B * S rows) the first tensor of an answer, also inside of what layers and models give."""
    for name in _HOLDS:
        output = getattr(output, name, output)
    output = output[0] if isinstance(output, tuple | list) and output else output
    if isinstance(output, Tensor) and output.is_floating_point() and output.ndim >= 2:
        count = shape[0] * shape[1]
        if output.shape[:2] == shape or output.shape[0] == count:
            return output
    got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    allowed, fix = "be a number for each token, first in what it gives", "pass a function that returns that tensor"
    raise UsageError(word("the output", got=got, allowed=allowed, where=_WHERE, fix=fix))


def routed_layers(model: Model, row_BS: Tensor) -> dict[str, Layer]:
    """The layers of experts inside a model, by name, each over the inputs that these rows give it.

    One is known by its parts: a module with a router or experts right inside.
    """
    handles, taken = [], dict[str, Tensor]()
    names = {name: module for name, module in model.module.named_modules() if name and _routes(module)}

    def look(name: str) -> Callable[..., None]:
        def before(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            first = next((one for one in [*given, *named.values()] if isinstance(one, Tensor)), None)
            if first is not None and first.is_floating_point() and first.shape[:2] == row_BS.shape:
                taken.setdefault(name, first.detach())

        return before

    for name, module in names.items():
        handles.append(module.register_forward_pre_hook(look(name), with_kwargs=True))
    try:
        model.run(row_BS)
    finally:
        for handle in handles:
            handle.remove()
    return {name: Layer(names[name], x.shape[-1], length=x.shape[1], name=name, like=x) for name, x in taken.items()}


def _routes(module: nn.Module) -> bool:
    return bool({part_of(name) for name, _ in module.named_children()} & {"router", "experts"})
