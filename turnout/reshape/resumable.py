"""What a reshape has worked out so far, layer by layer and batch by batch, so that one that was stopped can go on."""

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Kept", "by_batch", "by_layer", "keeping"]


class Kept(Protocol):
    """Where finished pieces are kept, and who is told of them.

    The pieces are asked for by name. The same reshape of the same model asks for the same names in the same order.

    Source: none; plain bookkeeping.
    """

    def name(self, what: str) -> str:
        """A name for the next stretch of work, unlike all before it."""

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The piece of that name, to the bit as it was put; None where there is none."""

    def put(self, name: str, piece: Mapping[str, Tensor]) -> None:
        """Keeps a piece, whole or not at all, in the place of one of that name."""

    def tell(self, what: str, done: int, of: int) -> None:
        """``done`` of ``of`` pieces of a stretch of work are there; first told of those from before, then at each."""


class Nowhere:
    """Keeps nothing, and tells nobody.

    Source: none; plain bookkeeping.
    """

    def name(self, what: str) -> str:
        """The same again."""
        return what

    def get(self, name: str) -> None:
        """None."""

    def put(self, name: str, piece: Mapping[str, Tensor]) -> None:
        """Nothing."""

    def tell(self, what: str, done: int, of: int) -> None:
        """Nothing."""


_KEPT: contextvars.ContextVar[Kept] = contextvars.ContextVar("kept")
_NOWHERE = Nowhere()


@contextlib.contextmanager
def keeping(kept: Kept) -> Iterator[None]:
    """While this is open, every reshape takes from ``kept`` what it finds there, and puts there what it works out.

    >>> class Told(Nowhere):
    ...     def tell(self, what, done, of):
    ...         print(f"{what}, layer {done} of {of}")
    >>> with keeping(Told()):
    ...     found = by_layer("squares", [3, 5], lambda layer: {"square": torch.tensor(layer**2)})
    squares, layer 0 of 2
    squares, layer 1 of 2
    squares, layer 2 of 2
    >>> found[5]["square"].item()
    25

    Source: none; plain bookkeeping.
    """
    token = _KEPT.set(kept)
    try:
        yield
    finally:
        _KEPT.reset(token)


def by_layer(
    what: str,
    layers: Iterable[int],
    work: Callable[[int], Mapping[str, Tensor]],
    *,
    then: Callable[[int, Mapping[str, Tensor]], None] = lambda layer, piece: None,
) -> dict[int, Mapping[str, Tensor]]:
    """Layer -> what ``work`` makes of it, or made of it before a stop.

    Args:
        what: the work in a word or two, to be told.
        layers: their numbers.
        work: must depend on nothing but the layer, and what ``then`` was told.
        then: is told of each layer with what was made of it, in order; of those from before a stop too.
    """
    kept, layers = _KEPT.get(_NOWHERE), list(layers)
    name, found = kept.name(what), dict[int, Mapping[str, Tensor]]()
    for layer in layers:
        piece = kept.get(f"{name}-{layer}")
        if piece is None:
            break
        found[layer] = piece
        then(layer, piece)
    kept.tell(what, len(found), len(layers))
    for layer in layers[len(found) :]:
        found[layer] = work(layer)
        kept.put(f"{name}-{layer}", found[layer])
        kept.tell(what, len(found), len(layers))
        then(layer, found[layer])
    return found


def by_batch(what: str, batches: Sequence[Tensor], sums: Mapping[str, Tensor], work: Callable[[Tensor], None]) -> None:
    """Lets ``work`` add every batch to ``sums``, in order; those that it added before a stop are there already.

    Args:
        what: the work in a word or two, to be told.
        batches: of token ids.
        sums: name -> a CPU tensor, changed in place by ``work``; this is what is kept.
        work: must depend on nothing but the batch, and change nothing but ``sums``.
    """
    kept = _KEPT.get(_NOWHERE)
    name, first = kept.name(what), 0
    if (before := kept.get(name)) is not None:
        first = int(before["batches"])
        for key, total in sums.items():
            total.copy_(before[key])
    kept.tell(what, first, len(batches))
    for done, batch in enumerate(batches[first:], first + 1):
        work(batch)
        kept.put(name, {**sums, "batches": torch.tensor(done)})
        kept.tell(what, done, len(batches))
