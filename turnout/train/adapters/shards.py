"""Training the shards that the adapters of a model are put together from."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.expects import expects
from turnout.layers import Sharded
from turnout.train.adapters.descend import descend

__all__ = ["train_shards"]

_WHERE = "turnout.train.train_shards"


@expects(model=nn.Module)
def train_shards(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    rate: float = 1e-3,
    clip: float = 0.3,
) -> tuple[float, ...]:
    """The loss of each step; the shards of the model are trained in place, one step a batch, and nothing else.

    Adam without weight decay, at a constant rate. The pools are ordinary parameters, so that any other loop will do.

    Args:
        model: one that ``turnout.reshape.attach_shards`` changed.
        batches: what ``loss`` takes; by default the keywords of a transformers model, with ``labels``.
        loss: from model and batch to a scalar; None is ``model(**batch).loss``.
        rate: the learning rate.
        clip: the largest norm of the gradient.

    Raises:
        UsageError: the model has no shards, or batches that need a ``loss``.
        TrainingError: the loss is not a number; the step is not taken.

    >>> import torch
    >>> from turnout.paths import Shards
    >>> paths = Shards(4, 4, 2, budget=1, rank=2, shards=2, private=0)
    >>> model = nn.Sequential(Sharded(nn.Linear(4, 4), paths, 0), Sharded(nn.Linear(4, 4), paths, 1), paths)[:2]
    >>> len(train_shards(model, [torch.ones(1, 4)] * 3, loss=lambda model, x: model(x).square().mean()))
    3

    Source: none; gradient descent, with Kingma and Ba, 2015, "Adam: A Method for Stochastic Optimization"; the clipping
    as Wang et al., 2025, "MoS".
    """
    pools = list({module.paths: None for module in model.modules() if isinstance(module, Sharded)})
    if not pools:
        fix = "call turnout.reshape.attach_shards first"
        raise UsageError(word("model", got="no shards", allowed="have shards", where=_WHERE, fix=fix))
    return descend(model, [(pools, rate)], batches, loss=loss, clip=clip, where=_WHERE)
