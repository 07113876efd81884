"""A model on the device that it is to run on; one that does not fit there is refused before anything is moved."""

import warnings
from typing import TypeVar

import torch
from torch import nn

from turnout.errors import UsageError, word
from turnout.measure import quantity
from turnout.measure.memory import free_on
from turnout.types.device import find_device, shown

__all__ = ["placed", "roomy", "weight_bytes"]

M = TypeVar("M", bound=nn.Module)
# Beside the weights: what the device's libraries take, and a short batch.
_SLACK, _BESIDE = 1.05, 256 * 2**20


def weight_bytes(model: nn.Module) -> int:
    """The bytes of parameters and buffers, tied ones once.

    >>> weight_bytes(nn.Linear(3, 2))
    32

    Source: none; a sum.
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def roomy(asked: object, size: int) -> torch.device:
    """The device that was asked for, which has room for weights of so many bytes and what comes along.

    With ``"auto"`` a CUDA device without that room gives way to the CPU, with a warning.

    Args:
        asked: as ``find_device`` takes it.
        size: bytes.

    Raises:
        UsageError: no such device, or one without room; says how much would fit.

    >>> roomy("cpu", 1000)
    device(type='cpu')

    Source: none; asks torch.
    """
    device = find_device(asked)
    free = None if device.type == "cpu" else free_on(device)
    if free is None or _SLACK * size + _BESIDE <= free:
        return device
    most = max(0.0, (free - _BESIDE) / _SLACK)
    got = f"{quantity(free)}B free on {shown(device)}"
    allowed = f"hold the {quantity(size)}B of the weights, and a little more"
    if asked != "auto":
        fix = f"pass device=cpu, or end what else runs there (see nvidia-smi); {quantity(most)}B of weights would fit"
        raise UsageError(word("the memory", got=got, allowed=allowed, where="turnout.device", fix=fix))
    warnings.warn(f"on the CPU: {got} does not {allowed}.", stacklevel=3)
    return torch.device("cpu")


def placed(model: M, asked: object = "auto") -> M:
    """The model, moved to the device that was asked for, as ``roomy`` finds it.

    Args:
        model: moved in place.
        asked: as ``find_device`` takes it.

    Raises:
        UsageError: no such device, one without room for the model, or without the dtype of its weights.

    >>> placed(nn.Linear(3, 2), "cpu").weight.device
    device(type='cpu')

    Source: none; asks torch.
    """
    device = find_device(asked)
    if {tensor.device for tensor in (*model.parameters(), *model.buffers())} <= {device}:
        return model
    device = roomy(asked, weight_bytes(model))
    if device.type == "mps" and any(tensor.dtype == torch.float64 for tensor in model.parameters()):
        got, fix = f"float64 weights on {device}", "pass device=cpu, or convert the model with --dtype float32"
        allowed = "have the dtype of the weights"
        raise UsageError(word("device", got=got, allowed=allowed, where="turnout.device", fix=fix))
    return model.to(device)
