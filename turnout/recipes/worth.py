"""What adapters are worth on a text: the loss with each of them alone, and the weight that a router gives each."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from turnout.layers import Adapter
from turnout.models.checkpoint import PeftAdapter
from turnout.recipes.calibration import Calibration
from turnout.reshape import attach, detach
from turnout.reshape.adapters.routers import even
from turnout.types import Routing

__all__ = ["alone", "nats", "weights"]


def alone(model: nn.Module, found: list[PeftAdapter], rows: Calibration, any_base: bool) -> dict[str, float]:
    """Nats a token of the model without adapters, with each of them alone, and with the mean of all."""
    loss = {"base": nats(model, rows)}
    for name, some in [*((one.name, [one]) for one in found), ("all, evenly", found)]:
        attach(model, some, router=even, any_base=any_base)
        loss[name] = nats(model, rows)
        detach(model)
    return loss


@torch.no_grad()
def nats(model: nn.Module, rows: Calibration) -> float:
    """The mean loss of predicting the next token of each row."""
    total, count = 0.0, 0
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    for id_BS in (batch.to(device) for batch in rows.batches):
        logits_BSV = model(input_ids=id_BS).logits[:, :-1].float()
        target_T = id_BS[:, 1:].reshape(-1)
        total += float(nn.functional.cross_entropy(logits_BSV.flatten(0, 1), target_T, reduction="sum"))
        count += target_T.numel()
    return total / count if count else math.nan


@contextlib.contextmanager
def weights(model: nn.Module, found: list[PeftAdapter]) -> Iterator[dict[str, dict[str, float]]]:
    """Linear map -> adapter -> the weight that its router gives it, added up while this is open."""
    total: dict[str, dict[str, float]] = {}

    def counter(module: str) -> Callable[[nn.Module, object, Routing], None]:
        total[module] = {one.name: 0.0 for one in found if module in one.factor}

        def hook(router: nn.Module, arguments: object, routing: Routing) -> None:
            for name, weight in zip(total[module], routing.detach().dense().sum(0).tolist(), strict=True):
                total[module][name] += weight

        return hook

    layers = {module: layer for module, layer in model.named_modules() if isinstance(layer, Adapter)}
    hooks = [layer.router.register_forward_hook(counter(module)) for module, layer in layers.items()]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()
