"""Training the routers of adapters that exist, and the adapters where that is asked for."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.expects import expects
from turnout.layers import Adapter
from turnout.train.adapters.descend import descend, unique

__all__ = ["train_routers"]

_WHERE = "turnout.train.train_routers"


@expects(model=nn.Module)
def train_routers(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    rate: float = 6e-3,
    adapters: bool = False,
    adapter_rate: float | None = None,
    clip: float = 1.0,
) -> tuple[float, ...]:
    """The loss of each step; the routers of the model's ``Adapter`` layers are trained in place, one step a batch.

    Adam without weight decay, at a constant rate. Which parameters ask for gradients, and which modules are in training
    mode, is afterwards as it was.

    Args:
        model: one that ``turnout.reshape.attach`` gave adapters, or any module with ``Adapter`` layers.
        batches: what ``loss`` takes; by default the keywords of a transformers model, with ``labels``. ``task_B`` and
            ``query_BQ`` among them are said by ``turnout.layers.given``.
        loss: from model and batch to a scalar; None is ``model(**batch).loss``.
        rate: the learning rate.
        adapters: whether the adapters are trained too.
        adapter_rate: the adapters' learning rate; None is ``rate``.
        clip: the largest norm of the gradient.

    Raises:
        UsageError: the model has no adapters, or their routers nothing to train; batches that need a ``loss``; or an
            ``adapter_rate`` for adapters that are not trained.
        TrainingError: the loss is not a number; the step is not taken.

    >>> import torch
    >>> from turnout.decide.token import TopK
    >>> from turnout.paths import LoRA
    >>> layer = Adapter(nn.Linear(4, 4), LoRA(4, 4, ranks=(1, 1)), TopK(4, 2, top_k=1))
    >>> len(train_routers(layer, [torch.ones(1, 4)] * 3, loss=lambda model, x: model(x).square().mean()))
    3

    Source: none; gradient descent, with Kingma and Ba, 2015, "Adam: A Method for Stochastic Optimization".
    """
    layers = [module for module in model.modules() if isinstance(module, Adapter)]
    if adapter_rate is not None and not adapters:
        fix = "pass adapters=True too, or leave it out"
        allowed = "be None where the adapters stay as they are"
        raise UsageError(word("adapter_rate", got=adapter_rate, allowed=allowed, where=_WHERE, fix=fix))
    rates = [([layer.router for layer in layers], rate)]
    if adapters:
        rates.append(([layer.paths for layer in layers], rate if adapter_rate is None else adapter_rate))
    if not any(unique(modules) for modules, _ in rates):
        got = f"{len(layers)} adapter layers, and no parameter in their routers"
        fix = "call turnout.reshape.attach with a router that learns"
        raise UsageError(word("model", got=got, allowed="have routers to train", where=_WHERE, fix=fix))
    return descend(model, rates, batches, loss=loss, clip=clip, where=_WHERE)
