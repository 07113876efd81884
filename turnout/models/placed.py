"""A model on the device that it is to run on; one that does not fit there is refused before anything is moved."""

from typing import TypeVar

import torch
from torch import nn

from turnout.errors import UsageError, word
from turnout.measure import quantity
from turnout.measure.memory import free_on
from turnout.types.device import find_device, shown

__all__ = ["fits", "placed", "weight_bytes"]

M = TypeVar("M", bound=nn.Module)
# Beside the weights: what the libraries of the device take, and what a short batch does.
_SLACK, _BESIDE = 1.05, 256 * 2**20


def weight_bytes(model: nn.Module) -> int:
    """The bytes of parameters and buffers, tied ones once.

    >>> weight_bytes(nn.Linear(3, 2))
    32

    Source: none; a sum.
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def fits(device: torch.device, size: int) -> bool:
    """Whether weights of so many bytes, and what comes along, fit into what is free there; True where nothing says."""
    free = free_on(device)
    return free is None or _SLACK * size + _BESIDE <= free


def placed(model: M, asked: object = "auto", *, where: str) -> M:
    """The model, moved to the device that was asked for; with ``"auto"`` to CUDA where it is there and has room.

    Args:
        model: moved in place.
        asked: as ``find_device`` takes it.
        where: who asks.

    Raises:
        UsageError: no such device, one without room for the model, or without the dtype of its weights.

    >>> placed(nn.Linear(3, 2), "cpu", where="the example").weight.device
    device(type='cpu')

    Source: none; asks torch.
    """
    device = find_device(asked, where=where)
    there = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if there <= {device} or device.type == "cpu":
        return model.to(device)
    size = weight_bytes(model)
    if not fits(device, size):
        if asked == "auto":
            return model.to("cpu")
        raise _no_room(model, device, size, where)
    if device.type == "mps" and any(tensor.dtype == torch.float64 for tensor in model.parameters()):
        got, fix = f"float64 weights on {device}", "pass device=cpu, or convert the model with --dtype float32"
        raise UsageError(word("device", got=got, allowed="have the dtype of the weights", where=where, fix=fix))
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        model.to("cpu")
        raise _no_room(model, device, size, where) from error


def _no_room(model: nn.Module, device: torch.device, size: int, where: str) -> UsageError:
    free, params = free_on(device) or 0, sum(tensor.numel() for tensor in model.parameters())
    most = max(0, int((free - _BESIDE) / _SLACK * params / max(size, 1)))
    got = f"{quantity(free)}B free on {shown(device)}"
    allowed = f"hold the {quantity(size)}B of this model's weights, and a little more"
    fix = f"pass device=cpu, or end what else runs there (nvidia-smi); up to {quantity(most)} parameters would fit now"
    return UsageError(word("the memory", got=got, allowed=allowed, where=where, fix=fix))
