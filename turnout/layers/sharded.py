"""A linear map whose adapter is put together from shards that other maps have too."""

from typing import Any

from torch import Tensor, nn

from turnout.errors import ShapeError, word
from turnout.layers.stock import as_if_plain, put_into_base
from turnout.paths import Shards
from turnout.types.called import Called

__all__ = ["Sharded"]


class Sharded(Called):
    """A linear map, plus what adapter m of some ``Shards`` adds.

    The shards belong to the model as a whole; here they are only referred to, so that they are counted, moved and saved
    once.

    Args:
        base: the linear map (D -> O), trained or frozen, as it is.
        paths: the shards.
        number: m, which of their maps this is.

    Raises:
        ShapeError: shards that do not fit the linear map, or have no such map.

    >>> import torch
    >>> layer = Sharded(nn.Linear(8, 4), Shards(8, 4, 3, rank=4), 0)
    >>> len(list(layer.parameters())), layer(torch.zeros(2, 5, 8)).shape
    (2, torch.Size([2, 5, 4]))

    Source: Wang et al., 2025, "MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards".
    """

    def __init__(self, base: nn.Linear, paths: Shards, number: int) -> None:
        super().__init__()
        shape = (base.in_features, base.out_features)
        if shape != (paths.width, paths.out) or not 0 <= number < paths.maps:
            got, allowed = f"{shape}, map {number}", f"be ({paths.width}, {paths.out}), one of {paths.maps} maps"
            fix = "build the shards for this linear map"
            raise ShapeError(word("base and number", got=got, allowed=allowed, where="turnout.layers.Sharded", fix=fix))
        self.base, self.number = base, number
        self._of = (paths,)  # in a tuple, and so not registered
        as_if_plain(self)

    @property
    def paths(self) -> Shards:
        """The shards."""
        return self._of[0]

    @property
    def weight(self) -> Tensor:
        """Of the linear map, for whoever looks at it."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """Of the linear map."""
        return self.base.bias

    def __setattr__(self, name: str, value: Any) -> None:
        """A weight or bias goes to the layer that has it: transformers ties weights by setting them."""
        if not put_into_base(self, name, value):
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """(..., O) the linear map of x (..., D), and what the adapter adds."""
        y = self.base(x)
        added = self.paths(x.to(self.paths.down.dtype), self.number)
        return y + added.to(y.dtype)
