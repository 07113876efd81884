"""What a cache of experts and the policy that governs it say to each other."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import numpy as np

from turnout.errors import UsageError, word

__all__ = ["Access", "CachePolicy", "CacheShape", "Decision", "Expert", "Seen"]

Expert = tuple[int, int]  # (layer, expert)
_WHERE = "turnout.types.CacheShape"


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """How many experts there are, and how many slots hold some of them.

    Args:
        layers: L, the layers that have experts, counted from 0 without the others.
        experts: E, of each layer.
        slots: how many experts fit: into each layer's own slots, or into those that all layers share.
        shared: whether the slots are one pool of all layers.

    Raises:
        UsageError: a number below 1.

    >>> CacheShape(layers=2, experts=8, slots=4, shared=False).capacity
    8

    Source: none; plain bookkeeping.
    """

    layers: int
    experts: int
    slots: int
    shared: bool = False

    def __post_init__(self) -> None:
        for name in ("layers", "experts", "slots"):
            if getattr(self, name) < 1:
                got, fix = getattr(self, name), f"pass {name}=1 or more"
                raise UsageError(word(name, got=got, allowed="be at least 1", where=_WHERE, fix=fix))

    @property
    def capacity(self) -> int:
        """How many experts of all layers fit."""
        return self.slots if self.shared else self.slots * self.layers


@dataclasses.dataclass(frozen=True)
class Access:
    """The experts that one layer's pass is about to read.

    Of a pass that needs more than fit there are several accesses, one after the other, of the same layer and step.

    Args:
        layer: which, counted as in ``CacheShape``.
        experts: their numbers, ascending, each once, never more than there are slots.
        step: which pass through the model, counted from 0; a pass reads the tokens of one step or of one prompt.
        tokens: the ids that the pass reads; empty where they are not known.
        sequence: which text is read; a policy that remembers one text begins anew when the number changes.
        coming: what is known to be asked for next, in order, as (layer, experts): a router that runs ahead tells it.

    >>> Access(layer=0, experts=(1, 5), step=0).tokens
    ()

    Source: none; plain bookkeeping.
    """

    layer: int
    experts: tuple[int, ...]
    step: int
    tokens: tuple[int, ...] = ()
    sequence: int = 0
    coming: tuple[tuple[int, tuple[int, ...]], ...] = ()


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is to be done before, and beside, the pass that an ``Access`` announces.

    ``evict`` comes first, then ``fetch``, then ``prefetch``: no layer, or pool, then holds more than it has slots.

    Args:
        evict: experts that give up their slots: each is held, and none is asked for by this access.
        fetch: those of the access that are not held, in the order of the access; the pass waits for them.
        prefetch: further experts, the most urgent first, none held and none in ``fetch``; they come while the pass
            goes on, and are held from here on.

    >>> Decision(evict=((0, 3),), fetch=((0, 1),)).prefetch
    ()

    Source: none; plain bookkeeping.
    """

    evict: tuple[Expert, ...] = ()
    fetch: tuple[Expert, ...] = ()
    prefetch: tuple[Expert, ...] = ()


class CachePolicy(Protocol):
    """Which experts are held: two pure functions over a state of the policy's own, so that a trace can be replayed.

    >>> class Always:
    ...     def init(self, sizes):
    ...         return frozenset()
    ...     def update(self, state, access):
    ...         wanted = [(access.layer, expert) for expert in access.experts]
    ...         missing = tuple(one for one in wanted if one not in state)
    ...         return frozenset(wanted), Decision(tuple(sorted(state - set(wanted))), missing)
    >>> policy: CachePolicy = Always()
    >>> policy.update(policy.init(CacheShape(1, 4, 2)), Access(0, (1, 2), step=0))[1].fetch
    ((0, 1), (0, 2))

    Source: none; the interface of caching algorithms, with the state written out.
    """

    def init(self, sizes: CacheShape) -> Any:
        """The state before the first access: nothing is held."""
        ...

    def update(self, state: Any, access: Access) -> tuple[Any, Decision]:
        """The state after this access, and what is to be done for it; the given state stays as it was."""
        ...


class Seen(NamedTuple):
    """What a policy has seen of each expert, P = L E of them, when a layer asks; a tuple, which a replay can compile.

    Args:
        last_P: the access that used it last, counted from 1; 0 for none.
        count_P: its uses.
        told_P: what the policy was told of it beforehand; zeros without.
        until_P: how many layers from now its turn comes: 1 for the next layer's, L for this one's.
        left: how many layers of this pass are still to come.
        tick: this access.
        began: the access before this pass.

    >>> Seen(np.zeros(2, np.int64), np.zeros(2), np.zeros(2), np.ones(2, np.int64), left=0, tick=1, began=0).tick
    1

    Source: none; plain bookkeeping.
    """

    last_P: np.ndarray
    count_P: np.ndarray
    told_P: np.ndarray
    until_P: np.ndarray
    left: int
    tick: int
    began: int
