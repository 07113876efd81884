"""Tensors that processes share, put together again: as one process would have them, and the norm of all of them."""

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from turnout.run.ranks.expert_parallel import Owners
from turnout.run.ranks.shard import Meshes, experts_in

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["clip", "copies_of", "gradient_norm", "of_experts", "picked", "settle", "whole", "whole_gradients"]


def whole(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor as one process has it: all of it, in the shape it has there, an expert with copies once.

    Every process calls it and gets all tensors, one after the other, so that keeping some of them is the caller's
    choice.

    Args:
        model: what ``turnout.run.ranks.shard`` gave.
        tensors: of its parameters, by their names: ``dict(model.named_parameters())``, or states of an optimizer.

    Yields:
        The name, and the whole tensor.

    Source: none; torch's all-gathers.
    """
    owners = of_experts(model)
    for name, tensor in tensors.items():
        full_tensor = getattr(tensor, "full_tensor", None)
        full = tensor.detach() if full_tensor is None else quiet(full_tensor).detach()
        yield name, picked(full, owners.get(name))


def whole_gradients(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """The gradient of each parameter as one process has it, or None where there is none; as ``whole``.

    Args:
        model: what ``turnout.run.ranks.shard`` gave, after a backward pass.

    Source: none; as ``whole``.
    """
    settle(model)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            yield name, None
        else:
            yield from whole(model, {name: parameter.grad})


@torch.no_grad()
def gradient_norm(model: nn.Module, meshes: Meshes, *, skip: Collection[str] = ()) -> Tensor:
    """The norm of all gradients together, of all stages, as one process has it; the same on every process.

    What several processes hold counts once: copies of a shard, and copies of an expert.

    Args:
        model: what ``turnout.run.ranks.shard`` gave; of a pipeline, this process's part.
        meshes: that it was spread over.
        skip: names of parameters that another stage counts, which holds a copy of them.

    Source: none; a sum of squares.
    """
    import torch.distributed as dist

    settle(model)
    owners = of_experts(model)
    total = torch.zeros((), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if parameter.grad is None or name in skip:
            continue
        grad: Any = parameter.grad
        copies, here = meshes.layout.world // meshes.layout.pp, grad
        if hasattr(grad, "to_local"):
            sizes = zip(grad.placements, grad.device_mesh.shape, strict=True)
            copies, here = 1, grad.to_local()
            for placement, size in sizes:
                copies *= size if placement.is_replicate() else 1
        square = here.double().square()
        if (held := owners.get(name)) is not None and held.copied:
            square = square / copies_of(held, grad).view(-1, *[1] * (square.ndim - 1))
        total += (square.sum() / copies).to(total)
    device = meshes.dense.device_type
    total = total.to(device)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def clip(model: nn.Module, norm: Tensor, most: float) -> None:
    """Scales all gradients so that their norm, which is given, is at most ``most``.

    Args:
        model: what ``turnout.run.ranks.shard`` gave.
        norm: as ``gradient_norm`` says.
        most: as torch.nn.utils.clip_grad_norm_ has it.

    Source: Pascanu et al., 2013, "On the difficulty of training recurrent neural networks".
    """
    settle(model)
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            grad: Any = parameter.grad
            here = grad.to_local() if hasattr(grad, "to_local") else grad
            here.mul_(factor.to(here))


def settle(model: nn.Module) -> None:
    """Gives up what is still gathered: after a forward pass alone, ``model.parameters()`` are not those that have the
    gradients, and that an optimizer moves.

    Args:
        model: what ``turnout.run.ranks.shard`` gave; any other is left alone.

    Source: none; FSDP2 keeps the parameters of the outermost module until the next backward pass.
    """
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            module.reshard()  # pyrefly: ignore[not-callable]


def picked(full: Tensor, held: Owners | None) -> Tensor:
    """Expert by expert what lies slot by slot, of an expert with copies the first.

    Args:
        full: of all slots.
        held: what lies in them; None where nothing is spread.

    Source: none; plain bookkeeping.
    """
    if held is None or held.in_order:
        return full
    slot_E = torch.full((held.num_experts,), len(held.expert_S), dtype=torch.int64)
    slot_E.scatter_reduce_(0, held.expert_S, torch.arange(len(held.expert_S)), "amin")
    return full[slot_E.to(full.device)]


def of_experts(model: nn.Module) -> dict[str, Owners]:
    """Who holds which experts, by the names of the parameters that are spread.

    Args:
        model: what ``turnout.run.ranks.shard`` gave.

    Source: none; plain bookkeeping.
    """
    owners = {}
    for name, module in experts_in(model):
        start = f"{name}." if name else ""
        if (held := getattr(module, "owners", None)) is not None:
            owners |= {f"{start}{part}": held for part, _ in module.named_parameters(recurse=False)}
    return owners


def copies_of(held: Owners, grad: "DTensor") -> Tensor:
    """(N,) how many copies there are of the expert in each row that this process has of a tensor.

    Args:
        held: who holds which experts.
        grad: the tensor, or another that is spread as it is.

    Source: none; plain bookkeeping.
    """
    count_E = torch.bincount(held.expert_S, minlength=held.num_experts)
    count = count_E[torch.tensor(held.own)]
    mesh = grad.device_mesh
    for axis, placement in enumerate(grad.placements[:-1]):  # the last is ep
        if not placement.is_replicate() and placement.dim == 0 and mesh.size(axis) > 1:  # pyrefly: ignore
            parts = count.chunk(mesh.size(axis))
            rank = mesh.get_local_rank(axis)
            count = parts[rank] if rank < len(parts) else count[:0]
    return count


def quiet(full_tensor: Any) -> Tensor:
    """Without torch's remark that two gathers follow each other, which shards within shards cannot do without."""
    import logging

    remark = logging.getLogger("torch.distributed.tensor._redistribute")
    level = remark.level
    remark.setLevel(logging.ERROR)
    try:
        return full_tensor()
    finally:
        remark.setLevel(level)
