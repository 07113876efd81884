"""Faults of training on many processes, planted on purpose: what a comparison of gradients must not let pass."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, nearest, word
from turnout.run.shard import Meshes, experts_in
from turnout.types import Routing

__all__ = ["FAULTS", "Fault"]

_WHERE = "turnout.recipes.planted"


class Fault:
    """Something that goes wrong: before the forward pass, in what is spread, or after the backward pass.

    Args:
        name: one of ``FAULTS``.

    Raises:
        UnknownNameError: another name.

    >>> Fault("drop").name
    'drop'

    Source: none; the defects of pytorch#160285, torchtitan#1551 and torchtitan#4054, and two more.
    """

    def __init__(self, name: str) -> None:
        if name not in FAULTS:
            raise nearest(name, FAULTS, kind="fault", where=_WHERE)
        self.name = name

    def plant(self, model: nn.Module, meshes: Meshes) -> None:
        """Changes the model that is spread, before it is used."""
        experts = [module for _, module in experts_in(model)]
        if self.name in ("factor", "drop") and (not experts or (self.name == "factor" and meshes.layout.ep == 1)):
            got = f"a model with {len(experts)} routed layers, ep={meshes.layout.ep}"
            allowed = "have experts on several processes" if self.name == "factor" else "have experts"
            fix = "plant 'skip', or take a layout with ep=2"
            raise UsageError(word(f"the fault {self.name!r}", got=got, allowed=allowed, where=_WHERE, fix=fix))
        if self.name == "drop":
            _drop(experts[0])
        if self.name == "skip":
            _skip(model)

    def spoil(self, model: nn.Module, meshes: Meshes) -> None:
        """Changes the gradients that came out."""
        if self.name == "factor":
            self._scale((p for _, module in experts_in(model) for p in module.parameters()), meshes.layout.ep)
        if self.name == "average":
            self._scale(model.parameters(), 1 / meshes.layout.data_ranks)
        if self.name == "lose":
            next(p for p in model.parameters() if p.grad is not None).grad = None

    @staticmethod
    def _scale(parameters: Any, factor: float) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


FAULTS: Mapping[str, str] = {
    "factor": "the gradients of experts are ep times too large, as averages over unlike meshes make them",
    "average": "all gradients are averaged over the processes once too often",
    "skip": "the gradients of one block are not summed over the processes",
    "drop": "the tokens of one expert are lost",
    "lose": "one parameter gets no gradient",
}


def _drop(experts: Any) -> None:
    forward: Callable[..., Tensor] = experts.forward

    def without(x_TD: Tensor, routing: Routing, **how: Any) -> Tensor:
        return forward(x_TD, routing.keep(routing.expert_R != int(routing.load_E.argmax())), **how)

    experts.forward = without


def _skip(model: nn.Module) -> None:
    """The first block's gradients stay what this process alone has."""
    from torch.distributed.fsdp import FSDPModule

    held = [module for module in model.modules() if isinstance(module, FSDPModule)]
    blocks = held[1:] or held  # the outermost, which holds what is left of the model, comes first
    if not blocks:
        got, allowed, fix = "one process", "have several processes", "take a layout of two or more"
        raise UsageError(word("the fault 'skip'", got=got, allowed=allowed, where=_WHERE, fix=fix))
    for state in blocks[0]._get_fsdp_state()._fsdp_param_groups:
        state._reduce_scatter_comm = _Alone()  # pyrefly: ignore[bad-assignment]
    blocks[0].set_requires_all_reduce(False)


class _Alone:
    """In the place of a reduce-scatter: this process's own share of its own gradients."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An empty tensor."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, **how: Any) -> None:
        """Takes the part that belongs here."""
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])
