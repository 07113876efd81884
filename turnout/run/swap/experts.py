"""The experts of a model that are in memory: slots, the policy that says whose they are, and how they come there."""

import contextlib
import dataclasses
import functools
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.run.pages import in_large_pages
from turnout.run.swap.loads import Load, Loads
from turnout.types import Access, CachePolicy, CacheShape, Decision, ExpertStats

__all__ = ["ExpertCache", "ExpertSource", "Part"]

_WHERE = "turnout.run.swap.ExpertCache"


@dataclasses.dataclass(frozen=True)
class Part:
    """One tensor of an expert: a matrix, its codes, scales, or a bias.

    >>> Part("up", (32, 8), torch.float32).nbytes
    1024

    Source: none; plain bookkeeping.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """What its numbers take."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ExpertSource(Protocol):
    """Where the experts of a model are kept while they are not in memory.

    >>> class Nowhere:
    ...     parts = ()
    ...     def read(self, layer, expert, into):
    ...         return 0
    ...     def close(self):
    ...         pass
    >>> source: ExpertSource = Nowhere()

    Source: none; an interface.
    """

    @property
    def parts(self) -> Sequence[Part]:
        """The tensors of an expert, the same of each."""
        ...

    def read(self, layer: int, expert: int, into: Sequence[Tensor]) -> int:
        """Writes one expert's tensors there; how many bytes were read. Called by several threads at once.

        Raises:
            TurnoutError: it cannot be read, or is no longer what it was.
        """
        ...

    def close(self) -> None:
        """Gives up what reading takes; nothing is read after it."""
        ...


class ExpertCache:
    """Slots that hold some of a model's experts, of all layers in one stack, and the policy that fills them.

    A pass asks for its experts in turn (``take``) and computes with the slots that it is told; it has them until it
    asks again. Passes of several threads go one after the other (``turn``).

    Args:
        source: where experts come from.
        shape: how many there are, and how many fit.
        policy: says who gives up a slot, and who is fetched ahead.
        threads: how many read while passes go on; whoever waits reads along.
        num_experts_L: how many experts each layer has, at most those of ``shape``; None for as many in every layer.

    Raises:
        UsageError: what the policy decides cannot be done.
        TurnoutError: what ``source`` raises, in the pass that needs the expert; the cache is empty afterwards.

    >>> class Numbers:
    ...     parts = [Part("up", (1,), torch.float32)]
    ...     def read(self, layer, expert, into):
    ...         into[0].fill_(10 * layer + expert)
    ...         return 4
    ...     def close(self):
    ...         pass
    >>> class Always:
    ...     def init(self, sizes):
    ...         return frozenset()
    ...     def update(self, state, access):
    ...         wanted = [(access.layer, expert) for expert in access.experts]
    ...         fetch = tuple(one for one in wanted if one not in state)
    ...         return frozenset(wanted), Decision(tuple(sorted(state - set(wanted))), fetch)
    >>> cache = ExpertCache(Numbers(), CacheShape(2, 8, 2, shared=True), Always(), threads=0)
    >>> with cache.turn():
    ...     cache.stacks[0][cache.take(1, [3, 5])].tolist()
    [[13.0], [15.0]]
    >>> cache.stats().misses
    2

    Source: Eliseev & Mazur, 2023, "Fast Inference of Mixture-of-Experts Language Models with Offloading", for a
    cache of experts; the policy is a function beside it, as in ``turnout.decide.device.cache``.
    """

    def __init__(
        self,
        source: ExpertSource,
        shape: CacheShape,
        policy: CachePolicy,
        *,
        threads: int = 1,
        num_experts_L: Sequence[int] | None = None,
    ) -> None:
        self.shape, self.policy, self.parts = shape, policy, tuple(source.parts)
        self.num_experts_L = tuple(num_experts_L or [shape.experts] * shape.layers)
        count = min(shape.capacity, sum(self.num_experts_L))
        self.stacks = tuple(torch.empty(count, *part.shape, dtype=part.dtype, device="cpu") for part in self.parts)
        in_large_pages(self.stacks)
        self._free = list(range(count))[::-1]
        self._held: dict[tuple[int, int], Load] = {}
        self._count_L = [0] * shape.layers
        self._state = policy.init(shape)
        self._turn = threading.RLock()
        self._step, self._layer, self._told = -1, shape.layers, False
        self._tokens: tuple[int, ...] = ()
        self._text, self._foretold = 0, threading.local()
        self._made = ExpertStats(count, sum(self.num_experts_L), sum(part.nbytes for part in self.parts))
        self._hits_L, self._misses_L, self._counts = [0] * shape.layers, [0] * shape.layers, [0] * 3
        self._waits_s, self._closed = 0.0, False
        stacks, moved = self.stacks, [0]
        self._moved, lock = moved, threading.Lock()

        def read(load: Load) -> None:
            size = source.read(load.layer, load.expert, [stack[load.slot] for stack in stacks])
            with lock:
                moved[0] += size

        self._loads = Loads(read, threads=threads)
        self._close = weakref.finalize(self, _close, self._loads, source)

    @property
    def limit(self) -> int:
        """How many experts of a layer a pass can have at once."""
        return min(self.shape.slots, len(self.stacks[0]))

    @functools.cached_property
    def outline(self) -> tuple[Tensor, ...]:
        """Of each part a stack for all experts of a layer, whose memory is never written to, and so takes none."""
        count = self.shape.experts
        found = []
        for part in self.parts:
            store = torch.UntypedStorage(count * part.nbytes, device="cpu")
            found.append(
                torch.empty(0, dtype=part.dtype, device="cpu").set_(
                    store, 0, (count, *part.shape), _strides(count, *part.shape)
                )
            )
        return tuple(found)

    @contextlib.contextmanager
    def turn(self, tokens: Sequence[int] | None = None, *, text: int = 0) -> Iterator[None]:
        """No other thread's passes come between.

        Args:
            tokens: those that a pass through all layers reads; None where a turn is of less than that.
            text: the number of the text that is read, its own for as long as the program runs; 0 where it is not known,
                or several are read at once. Turns within this one that do not say are of the same.

        Raises:
            UsageError: the cache was closed.
        """
        with self._turn:
            if self._closed:
                fix = "read the model again"
                raise UsageError(word("the experts", got="a closed cache", allowed="be open", where=_WHERE, fix=fix))
            told = tokens is not None and not self._told
            before, self._text = self._text, text or self._text
            if tokens is not None and told:
                self._told, self._tokens, self._layer = True, tuple(tokens), -1
                self._step += 1
            try:
                yield
            finally:
                self._text = before
                if told:
                    self._told, self._tokens, self._layer = False, (), self.shape.layers

    def foretell(self, experts_L: Sequence[Sequence[int]]) -> None:
        """What this thread's next pass will ask of each layer: for a router that has run ahead of it.

        Args:
            experts_L: for each layer with experts their numbers, ascending.
        """
        self._foretold.experts_L = tuple(map(tuple, experts_L))

    def _coming(self, layer: int, experts: Sequence[int]) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """What is known to come: the rest of this layer's, where not all fit at once, then those of later layers."""
        known: tuple[tuple[int, ...], ...] = getattr(self._foretold, "experts_L", ())
        rest = ((layer, tuple(one for one in known[layer] if one > experts[-1])),) if known and experts else ()
        return tuple(one for one in (*rest, *enumerate(known[layer + 1 :], layer + 1)) if one[1])

    def take(self, layer: int, experts: Sequence[int], *, more: bool = False) -> list[int]:
        """The slots of these experts, which are there when this returns and stay until the next call.

        Args:
            layer: of those with experts.
            experts: ascending, each once, at most ``limit``.
            more: whether the same pass has asked this layer for others before.

        Raises:
            UsageError: what the policy decides cannot be done.
            TurnoutError: an expert cannot be read; the cache is empty then.
        """
        if not self._told and not more and layer <= self._layer:
            self._step += 1
        self._layer = layer
        step, coming = max(self._step, 0), self._coming(layer, experts)
        access = Access(layer, tuple(experts), step, self._tokens, self._text, coming)
        try:
            return self._take(access)
        except BaseException:
            self._forget()
            raise

    def _take(self, access: Access) -> list[int]:
        wanted = [(access.layer, expert) for expert in access.experts]
        state, decision = self.policy.update(self._state, access)
        self._count(access.layer, wanted)
        if decision.evict or decision.fetch or decision.prefetch or len(decision.fetch) != self._missing(wanted):
            self._apply(decision, wanted)
        self._state = state
        loads = [self._held[one] for one in wanted]
        if any(load.state != "there" for load in loads):
            start = time.perf_counter()
            self._loads.finish(loads)
            self._waits_s += time.perf_counter() - start
            for load in loads:
                if load.error is not None:
                    raise load.error
        return [load.slot for load in loads]

    def _missing(self, wanted: Sequence[tuple[int, int]]) -> int:
        return sum(one not in self._held for one in wanted)

    def _count(self, layer: int, wanted: Sequence[tuple[int, int]]) -> None:
        """Counts what is held; an expert that was fetched ahead is so no longer."""
        for one in wanted:
            load = self._held.get(one)
            if load is None:
                self._misses_L[layer] += 1
                continue
            self._hits_L[layer] += 1
            if load.ahead:
                load.ahead = False
                self._counts[1] += 1

    def _apply(self, decision: Decision, wanted: Sequence[tuple[int, int]]) -> None:
        """Gives slots to others, and has these fetched."""
        for one in decision.evict:
            if one not in self._held or one in wanted:
                raise self._refusal(f"to evict {one}", "evict what is held, and not asked for")
            self._loads.drop(load := self._held.pop(one))
            self._free.append(load.slot)
            self._count_L[one[0]] -= 1
            self._counts[2] += 1
        missing = tuple(one for one in wanted if one not in self._held)
        if decision.fetch != missing:
            raise self._refusal(f"to fetch {decision.fetch}", f"fetch what is missing, {missing}")
        self._loads.put([self._placed(one, ahead=False) for one in decision.fetch], urgent=True)
        self._loads.put([self._placed(one, ahead=True) for one in decision.prefetch], urgent=False)
        self._counts[0] += len(decision.prefetch)

    def _placed(self, one: tuple[int, int], *, ahead: bool) -> Load:
        layer, expert = one
        there = 0 <= layer < self.shape.layers and 0 <= expert < self.num_experts_L[layer]
        if one in self._held or not there:
            raise self._refusal(f"to fetch {one}", "fetch experts that there are, and that are not held")
        if not self._free or (not self.shape.shared and self._count_L[layer] >= self.shape.slots):
            raise self._refusal(f"to fetch {one} without room", f"hold no more than {self.shape} has slots")
        load = self._held[one] = Load(layer, expert, self._free.pop(), ahead=ahead)
        self._count_L[layer] += 1
        return load

    def _forget(self) -> None:
        """Empties the cache: nobody knows what is there after a failure."""
        for load in self._held.values():
            self._loads.drop(load)
            self._free.append(load.slot)
        self._held.clear()
        self._count_L = [0] * self.shape.layers
        self._state = self.policy.init(self.shape)

    def _refusal(self, got: str, allowed: str) -> UsageError:
        what = f"the policy {type(self.policy).__name__}"
        return UsageError(word(what, got=got, allowed=allowed, where=_WHERE, fix="use another policy, as LRU"))

    def stats(self) -> ExpertStats:
        """What was asked for and done so far; any thread may ask."""
        ahead, used, evicted = self._counts
        return dataclasses.replace(
            self._made,
            hits=sum(self._hits_L),
            misses=sum(self._misses_L),
            waits_s=self._waits_s,
            fetched_bytes=self._moved[0],
            prefetched=ahead,
            prefetched_used=used,
            evicted=evicted,
            layer_hits=tuple(self._hits_L),
            layer_misses=tuple(self._misses_L),
        )

    def close(self) -> None:
        """Ends the threads and gives up files and slots; what is computed after it is refused."""
        with self._turn:
            self._closed = True
            self._close()
            self._held.clear()
            self.stacks = tuple(stack[:0].clone() for stack in self.stacks)

    def __getstate__(self) -> object:
        """Refused: threads and open files cannot be copied.

        Raises:
            UsageError: always.
        """
        fix = "read the model again where another is needed"
        allowed = "stay one: its experts are in files"
        raise UsageError(
            word("a model with few experts in memory", got="a copy", allowed=allowed, where=_WHERE, fix=fix)
        )


def _strides(*shape: int) -> tuple[int, ...]:
    return tuple(torch.empty(shape, device="meta").stride())


def _close(loads: Loads, source: ExpertSource) -> None:
    loads.close()
    source.close()
