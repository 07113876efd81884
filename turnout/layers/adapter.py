"""A linear map with adapters and a router that chooses among them, for each token or for each sequence."""

import zlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from turnout.errors import CheckpointError, ShapeError, word
from turnout.layers.stock import as_if_plain, put_into_base
from turnout.layers.told import about, real
from turnout.paths import LoRA
from turnout.run import low_rank
from turnout.types import Given, Routing, spread
from turnout.types.called import Called
from turnout.wrappers import unwrapped

__all__ = ["Adapter", "SequenceRouter"]

# Where a state dict says which adapters its stacked factors are.
_SIGNATURE = "paths.signature_N3"


@runtime_checkable
class SequenceRouter(Protocol):
    """A router that decides for whole sequences: one row of the routing for each of its ``parts`` of each sequence.

    >>> class Even(nn.Module):
    ...     parts = 1
    ...     def forward(self, x_TD, *, given):
    ...         return Routing.from_dense(torch.full((given.num_sequences, 2), 0.5))
    >>> isinstance(Even(), SequenceRouter)
    True

    Source: none; an interface.
    """

    parts: int

    def forward(self, x_TD: Tensor, *, given: Given) -> Routing:
        """The routing of ``given.num_sequences * parts`` rows over the adapters."""
        ...


class Adapter(Called):
    """A linear map, adapters of it, and the router that says which of them a token or a sequence takes.

    y = base(x) + sum_n w_n * scale_n * B_n A_n x for a router of tokens. A router of sequences (``SequenceRouter``)
    merges the factors first, A = sum_n w_n A_n and B = sum_n w_n scale_n B_n, and adds B A x: one adapter's work.

    Args:
        base: the linear map, for example ``nn.Linear``; it may be trained or frozen, as it is.
        paths: the adapters.
        router: of as many experts as there are adapters: any router of ``turnout.decide.token``. One with the attribute
            ``parts`` is called with ``given`` and decides for sequences; one with a true ``needs_given`` is called with
            ``given`` too, and decides for tokens. One with ``fold`` changes the adapters' factors before they are used.
        names: of the adapters; None is "0", "1" and so on.

    Raises:
        ShapeError: adapters that do not fit the linear map, or a router of another number of experts.

    >>> from turnout.decide.token import TopK
    >>> layer = Adapter(nn.Linear(8, 4), LoRA(8, 4, ranks=(2, 2, 3)), TopK(8, 3, top_k=2))
    >>> layer(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 5, 4])

    Source: Hu et al., 2021, "LoRA", for the adapters; Muqeeth et al., 2024, "Learning to Route Among Specialized
    Experts for Zero-Shot Generalization", for routing at every linear map.
    """

    def __init__(self, base: nn.Module, paths: LoRA, router: nn.Module, *, names: Sequence[str] | None = None) -> None:
        super().__init__()
        shape = tuple(getattr(base, "weight", torch.empty(0)).shape)
        fits = (paths.up.shape[1], paths.down.shape[1])
        experts = getattr(unwrapped(router), "num_experts", paths.num_paths)
        if (len(shape) == 2 and shape != fits) or experts != paths.num_paths:
            got = f"a linear map {shape}, and a router of {experts}"
            allowed = f"be {fits} for these adapters, and a router of {paths.num_paths}"
            fix = "build adapters and router for this linear map"
            raise ShapeError(word("base and router", got=got, allowed=allowed, where="turnout.layers.Adapter", fix=fix))
        self.base, self.paths, self.router = base, paths, router
        self.names = tuple(names or map(str, range(paths.num_paths)))
        as_if_plain(self)
        self.register_state_dict_post_hook(_signed)
        self.register_load_state_dict_pre_hook(_compared)

    @property
    def weight(self) -> Tensor:
        """Of the linear map, for whoever looks at it."""
        return self.base.weight  # pyrefly: ignore[bad-return]

    @property
    def bias(self) -> Tensor | None:
        """Of the linear map."""
        return self.base.bias  # pyrefly: ignore[bad-return]

    def __setattr__(self, name: str, value: Any) -> None:
        """A weight or bias goes to the layer that has it: transformers ties weights by setting them."""
        if not put_into_base(self, name, value):
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """(..., O) the linear map of x (..., D), and what the chosen adapters add.

        Raises:
            UsageError: the router wants to know something that ``given`` did not say.
            ShapeError: what it said does not fit x.
        """
        y = self.base(x)
        x_TD = x.reshape(-1, x.shape[-1])
        routing, found = self.decide(x)
        x_TD = x_TD.to(self.paths.down.dtype)
        asked = unwrapped(self.router)
        parts, fold = getattr(asked, "parts", None), getattr(asked, "fold", None)
        if fold is not None:
            added_TO = low_rank(x_TD, routing, fold(self.paths.weights()))
        elif parts is None:
            added_TO = self.paths(x_TD, routing)
        else:
            added_TO = self.paths.merged(x_TD, routing, _sequence(found), parts=parts)
        if added_TO.shape[1] != y.shape[-1]:
            got, allowed = f"{y.shape[-1]} features of the linear map", f"be the {added_TO.shape[1]} of its adapters"
            fix = "detach before the model is resized, and attach adapters of the new size"
            raise ShapeError(
                word("what is added to", got=got, allowed=allowed, where="turnout.layers.Adapter", fix=fix)
            )
        return y + added_TO.view(y.shape).to(y.dtype)

    def decide(self, x: Tensor) -> tuple[Routing, Given | None]:
        """The router's decision for x (..., D), and what was known of the sequences where it asks for that."""
        x_TD = x.reshape(-1, x.shape[-1])
        asked = unwrapped(self.router)
        if not hasattr(asked, "parts") and not getattr(asked, "needs_given", False):
            # A capacity alone lets one token take another's place; else padding is nobody's business here, as in PEFT.
            real_T = None if getattr(asked, "capacity_factor", None) is None else real(x)
            return self.router(x_TD) if real_T is None else spread(self.router(x_TD[real_T]), real_T), None
        found = about(x)
        return self.router(x_TD, given=found), found


def _signature(layer: "Adapter") -> Tensor:
    """(N, 3) int64, of each adapter its name, its rank and its scale: stacked, they look alike in any order."""
    said_N = (f"{scale:.6g}" for scale in layer.paths.scale_N)  # a folder holds alpha, which is divided again
    rows = zip(layer.names, layer.paths.border_N[1:], said_N, strict=True)
    return torch.tensor([[zlib.crc32(a.encode()), b, zlib.crc32(c.encode())] for a, b, c in rows], dtype=torch.int64)


def _signed(layer: "Adapter", state: dict[str, Any], prefix: str, metadata: object) -> None:
    state[prefix + _SIGNATURE] = _signature(layer)


def _compared(layer: "Adapter", state: dict[str, Any], prefix: str, *rest: object) -> None:
    """Refuses the state of other adapters, or of these in another order; one of before has no signature."""
    found = state.pop(prefix + _SIGNATURE, None)
    if found is not None and not torch.equal(found.cpu(), _signature(layer)):
        got = f"the state of others than {', '.join(layer.names)}, or of these in another order"
        allowed, fix = "be of the very adapters, in their order", "attach them as they were when this state was saved"
        raise CheckpointError(word("adapters", got=got, allowed=allowed, where="load_state_dict", fix=fix))


def _sequence(found: Given | None) -> Tensor:
    assert found is not None  # decide gives it to routers of sequences
    return found.sequence_T
