"""A layer whose output is scaled and shifted by what each instance takes from a pool; and the model that asks first."""

from typing import Any

import torch
from torch import Tensor, nn

from turnout.decide.token import FedIns
from turnout.layers.stock import as_if_plain, put_into_base
from turnout.layers.told import about, given
from turnout.paths import SSF
from turnout.types.called import Called

__all__ = ["Asking", "Scaled"]


class Scaled(Called):
    """A layer, and a pool of scales and shifts of what it gives; a router of sequences says which an instance takes.

    Args:
        base: the layer; what it gives has as many features as the pool.
        paths: the pool.
        router: with the attribute ``parts``, such as ``turnout.decide.token.FedIns``.

    >>> layer = Scaled(nn.Linear(4, 3), SSF(5, 3), FedIns(3, 5))
    >>> layer(torch.zeros(2, 7, 4)).shape
    torch.Size([2, 7, 3])

    Source: Feng et al., 2023, "Towards Instance-adaptive Inference for Federated Learning".
    """

    def __init__(self, base: nn.Module, paths: SSF, router: nn.Module) -> None:
        super().__init__()
        self.base, self.paths, self.router = base, paths, router
        as_if_plain(self)

    @property
    def weight(self) -> Tensor:
        """Of the layer, for whoever looks at it."""
        return self.base.weight  # pyrefly: ignore[bad-return]

    @property
    def bias(self) -> Tensor | None:
        """Of the layer."""
        return self.base.bias  # pyrefly: ignore[bad-return]

    def __setattr__(self, name: str, value: Any) -> None:
        """A weight or bias goes to the layer that has it: transformers ties weights by setting them."""
        if not put_into_base(self, name, value):
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives, scaled and shifted.

        Raises:
            UsageError: the router wants to know something that ``turnout.layers.given`` did not say.
        """
        y = self.base(x)
        y_TD, found = y.reshape(-1, y.shape[-1]), about(y)
        return self.paths.merged(y_TD, self.router(y_TD, given=found), found.sequence_T).view(y.shape)


class Asking(Called):
    """A model whose routers read a query: what a frozen network sees in the same input.

    Args:
        model: called inside ``given(query_BQ=query(x))``.
        query: from the model's input to (B, Q); it is never trained, and may share the model's frozen layers.
        router: the model's one router, for ``match``.

    >>> router = FedIns(3, 5, query_width=4)
    >>> model = Asking(nn.Sequential(Scaled(nn.Linear(4, 3), SSF(5, 3), router)), nn.Identity(), router)
    >>> model(torch.ones(2, 4)).shape, model.match(torch.ones(2, 4)).shape
    (torch.Size([2, 3]), torch.Size([]))

    Source: Feng et al., 2023, "Towards Instance-adaptive Inference for Federated Learning".
    """

    def __init__(self, model: nn.Module, query: nn.Module, router: FedIns) -> None:
        super().__init__()
        self.model, self.query, self.router = model, query.requires_grad_(False).eval(), router

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the model gives."""
        query_BQ = self.ask(*inputs, **named)
        with given(query_BQ=query_BQ, batch=len(query_BQ)):
            return self.model(*inputs, **named)

    def match(self, *inputs: Any, **named: Any) -> Tensor:
        """How near the queries of these inputs are to the keys they choose, a scalar; training adds 1 - match."""
        return self.router.match(self.ask(*inputs, **named))

    @torch.no_grad()
    def ask(self, *inputs: Any, **named: Any) -> Tensor:
        """(B, Q) the query of each instance."""
        return self.query(*inputs, **named)

    def train(self, mode: bool = True) -> "Asking":
        """The query's network stays in evaluation mode."""
        super().train(mode)
        self.query.eval()
        return self
