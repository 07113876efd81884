"""A module whose calls are typed: they take what its ``forward`` takes, and give what that gives."""

from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

from torch import nn

Takes = ParamSpec("Takes")
Gives_co = TypeVar("Gives_co", covariant=True)


class Forward(Protocol[Takes, Gives_co]):
    """What has a ``forward``."""

    def forward(self, *args: Takes.args, **kwargs: Takes.kwargs) -> Gives_co:
        """What a call computes."""
        ...


class Called(nn.Module):
    """A module. Of ``nn.Module`` a type checker knows that it can be called with anything, and gives Any."""

    if TYPE_CHECKING:

        def __call__(self: Forward[Takes, Gives_co], *args: Takes.args, **kwargs: Takes.kwargs) -> Gives_co:
            """What ``forward`` gives, and every hook."""
            ...
