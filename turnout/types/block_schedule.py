"""BlockSchedule: in which order the chip and the wires do all that sparse transformer blocks ask of them in a step."""

import dataclasses
import hashlib
import itertools
import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, Self

from turnout.errors import CheckpointError, UsageError, word
from turnout.fields import build

__all__ = ["BlockSchedule", "BlockTask", "Resource"]

_FORMAT, _WHERE = "turnout.block_schedule/1", "turnout.types.BlockSchedule"
_NAME = re.compile(r"([A-Z][a-z]?'?)(\d+)\.(\d+)")

Resource = Literal["compute", "wire", "inner"]
RESOURCES: tuple[Resource, ...] = ("compute", "wire", "inner")
# Every kind of task, with what it occupies.
_KINDS = ("A G E E' Ex Ew G' A' Ax Aw", "D C C' D' Ra Re", "N M M' N'")
KINDS: Mapping[str, Resource] = {
    kind: resource for resource, kinds in zip(RESOURCES, _KINDS, strict=True) for kind in kinds.split()
}


class BlockTask(NamedTuple):
    """One piece of work of one block: what it is, of which block, of which chunk.

    Forward: ``A`` attention, ``G`` gate and permute, ``D`` dispatch, ``N`` the same inside the node, ``E`` experts,
    ``M`` what goes before the combine inside the node, ``C`` combine and add. Backward: ``C' M' E' N' D' G' A'``;
    ``Ex`` and ``Ew`` in place of ``E'`` are the gradient of its input and of its weights apart, ``Ax`` and ``Aw`` in
    place of ``A'``. ``Ra`` and ``Re`` reduce a piece of the gradient of what is dense (attention, gate, norms) and of
    the experts; their ``chunk`` is the piece. ``A G G' A' Ax Aw`` count attention's chunks, all others the experts'.

    >>> str(BlockTask("Ex", 1, 2)), BlockTask.parse("Ra0.3")
    ('Ex1.2', BlockTask(kind='Ra', block=0, chunk=3))

    Source: Gao et al., 2025, "FlowMoE", for tasks of the whole block; Jiang et al., 2024, "Lancet", for weight halves.
    """

    kind: str
    block: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.kind}{self.block}.{self.chunk}"

    @property
    def resource(self) -> Resource:
        """What it occupies."""
        return KINDS[self.kind]

    @classmethod
    def parse(cls, text: object) -> Self:
        """The task of a name such as ``Ex1.2``.

        Raises:
            UsageError: no such name.
        """
        match = _NAME.fullmatch(text) if isinstance(text, str) else None
        if match is None or match[1] not in KINDS:
            allowed, fix = f"be one of {' '.join(KINDS)}, then block.chunk", "write D0.1 for the dispatch of chunk 1"
            raise UsageError(word("a task", got=repr(text), allowed=allowed, where=_WHERE, fix=fix))
        return cls(match[1], int(match[2]), int(match[3]))


@dataclasses.dataclass(frozen=True)
class BlockSchedule:
    """The order of everything that ``blocks`` alike sparse blocks do in one training step, on each resource.

    Attention works in ``attention_chunks`` parts of the rows and experts in ``expert_chunks``: part i of r is the rows
    from floor(i n / r) to floor((i + 1) n / r), so a part of one kind needs those of the other that it shares rows
    with, whatever n is. Each resource runs its tasks one at a time in the order given, each as soon as what it needs is
    there (``needs``). All ranks hold the same schedule and issue each wire's collectives in its order.

    Args:
        blocks: how many, L.
        attention_chunks: parts that attention and gate work in.
        expert_chunks: parts that dispatch, experts and combine work in.
        compute: the order on the chip.
        wire: the order on the wire that all-to-alls and reductions take: between nodes where there are several.
        inner: the order on the wire inside a node; empty where all-to-alls have one stage.
        dense_bytes: bytes of each piece of a block's dense gradient; empty where nothing is reduced.
        expert_bytes: the same of its experts' gradient.
        cut: whether parts are of the ``batch``, which do not meet in attention, or of the ``sequence``, where causal
            attention of a part needs the keys of the parts before it, and its gradient those of the parts behind.
        turn: when backward begins: for a ``chunk`` once its own rows are through (the loss is a sum over rows), or once
            the ``whole`` batch is.
        window: the most chunks between the start of their first attention and the end of their last weight gradient:
            chunk i begins when chunk i - window is done. None for all.
        carried: reductions that run under the next step's forward pass, whose attention in that block waits for them:
            only where nothing, such as a norm over all gradients, needs them together before.
        method: who made it.

    Raises:
        UsageError: numbers that do not go together. Whether the orders are right is asked with ``check``.

    >>> order = [BlockTask.parse(name) for name in "A0.0 G0.0 E0.0 E'0.0 G'0.0 A'0.0".split()]
    >>> wire = [BlockTask.parse(name) for name in "D0.0 C0.0 C'0.0 D'0.0 Ra0.0".split()]
    >>> schedule = BlockSchedule(1, 1, 1, tuple(order), tuple(wire), dense_bytes=(1024,))
    >>> schedule.check()
    >>> BlockSchedule.from_json_dict(schedule.to_json_dict()) == schedule
    True

    Source: Gao et al., 2025, "FlowMoE"; Hwang et al., 2023, "Tutel"; Pan et al., 2025, "FSMoE". Unequal parts of
        attention and experts, the turn by chunk, window and carried reductions are ours.
    """

    blocks: int
    attention_chunks: int
    expert_chunks: int
    compute: tuple[BlockTask, ...]
    wire: tuple[BlockTask, ...]
    inner: tuple[BlockTask, ...] = ()
    dense_bytes: tuple[int, ...] = ()
    expert_bytes: tuple[int, ...] = ()
    cut: Literal["batch", "sequence"] = "batch"
    turn: Literal["whole", "chunk"] = "whole"
    window: int | None = None
    carried: tuple[BlockTask, ...] = ()
    method: str = "by hand"

    def __post_init__(self) -> None:
        for name in ("blocks", "attention_chunks", "expert_chunks"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise _refuse(name, getattr(self, name), "be a whole number of at least 1", f"pass {name}=1")
        for name, allowed in (("cut", ("batch", "sequence")), ("turn", ("whole", "chunk"))):
            if getattr(self, name) not in allowed:
                raise _refuse(name, getattr(self, name), f"be {' or '.join(allowed)}", f"pass {name}={allowed[0]!r}")
        if any(not isinstance(size, int) or size < 1 for size in self.dense_bytes + self.expert_bytes):
            raise _refuse("bytes of a piece", self.dense_bytes + self.expert_bytes, "be at least 1", "leave it out")
        # A chunk that waits for another one's backward pass must not be waited for in it.
        apart = self.cut == "batch" and self.turn == "chunk" and self.attention_chunks == self.expert_chunks
        if self.window is not None and (self.window < 1 or not apart):
            allowed = "be at least 1, with cut='batch', turn='chunk' and as many chunks of attention as of experts"
            raise _refuse("window", self.window, allowed, "pass window=None")

    @property
    def tasks(self) -> tuple[BlockTask, ...]:
        """Every task, in the order of each resource, compute first."""
        return self.compute + self.wire + self.inner

    @property
    def order(self) -> Mapping[Resource, tuple[BlockTask, ...]]:
        """The tasks by resource."""
        return {"compute": self.compute, "wire": self.wire, "inner": self.inner}

    def sharing(self, chunk: int, *, of: int, among: int) -> range:
        """Which of ``among`` parts of the rows share rows with part ``chunk`` of ``of``.

        >>> BlockSchedule(1, 2, 3, (), ()).sharing(1, of=3, among=2)
        range(0, 2)
        """
        return range(chunk * among // of, -(-(chunk + 1) * among // of))

    def needs(self) -> dict[BlockTask, tuple[BlockTask, ...]]:
        """What has to be done before each task, besides what is before it on its resource."""
        present, late = frozenset(self.tasks), frozenset(self.carried)
        found = {}
        for task in self.tasks:
            needed = () if task in late else _before(self, task, present)
            found[task] = tuple(one for one in needed if one in present)
        return found

    def check(self) -> None:
        """Refuses a schedule that is not whole, has a task twice or on the wrong resource, or cannot end.

        Raises:
            UsageError: which task, and what is wrong with it.
        """
        seen: set[BlockTask] = set()
        for resource, order in self.order.items():
            for task in order:
                if task.resource != resource:
                    raise _refuse(f"task {task}", f"on {resource}", f"be on {task.resource}", "move it there")
                if task in seen:
                    raise _refuse(f"task {task}", "there twice", "be there once", "leave one out")
                seen.add(task)
        wanted = set(_whole(self, seen))
        if wanted != seen:
            missing, more = sorted(wanted - seen), sorted(seen - wanted)
            got = f"without {' '.join(map(str, missing[:5]))}" if missing else f"with {' '.join(map(str, more[:5]))}"
            allowed = "have every task of every block and chunk once"
            raise _refuse("the schedule", got, allowed, "build it with turnout.decide.device.block_schedule")
        wrong = [task for task in self.carried if task.kind not in ("Ra", "Re") or task not in seen]
        if wrong:
            raise _refuse(f"carried {wrong[0]}", "no reduction of it", "be a reduction", "leave it out")
        stuck = _stuck(self)
        if stuck:
            got = f"each waiting for the next: {' '.join(map(str, stuck[:6]))}"
            raise _refuse("the order", got, "come to an end", "put what is needed first")

    @property
    def digest(self) -> str:
        """A hash of all of it, which ranks compare before the first step."""
        text = json.dumps(self.to_json_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_json_dict(self) -> dict[str, object]:
        """The schedule as plain JSON values, a task as its name."""
        body: dict[str, object] = {"format": _FORMAT}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                value = [str(one) if isinstance(one, BlockTask) else one for one in value]
            body[field.name] = value
        return body

    @classmethod
    def from_json_dict(cls, body: Mapping[str, object], where: str = "schedule.json") -> Self:
        """The schedule that ``to_json_dict`` gave.

        Raises:
            CheckpointError: not a schedule.
            UsageError: a field that is not right.
        """
        if body.get("format") != _FORMAT:
            got, allowed = f"format {body.get('format')!r:.40}", f"have format {_FORMAT!r}"
            fix = "write it with BlockSchedule.to_json_dict"
            raise CheckpointError(word(where, got=got, allowed=allowed, where=_WHERE, fix=fix))
        named = ("compute", "wire", "inner", "carried")
        values = {name: value for name, value in body.items() if name not in ("format", *named)}
        tasks: dict[str, typing.Any] = {}
        for name in named:
            names = body.get(name, [])
            if not isinstance(names, list):
                raise _refuse(f"{where}: {name}", names, "be a list of tasks", "write it with to_json_dict")
            tasks[name] = tuple(BlockTask.parse(one) for one in names)
        return dataclasses.replace(build(cls, values | {"compute": [], "wire": []}, where), **tasks)


def _refuse(what: str, got: object, allowed: str, fix: str) -> UsageError:
    return UsageError(word(what, got=got, allowed=allowed, where=_WHERE, fix=fix))


def _whole(schedule: BlockSchedule, seen: Iterable[BlockTask]) -> Iterator[BlockTask]:
    """Every task that there has to be, with the backward pass in halves where ``seen`` has a half of it."""
    seen = frozenset(seen)
    wires = ("D", "C", "C'", "D'") + (("N", "M", "M'", "N'") if schedule.inner else ())
    pieces = {"Ra": len(schedule.dense_bytes), "Re": len(schedule.expert_bytes)}
    for block in range(schedule.blocks):
        for chunk in range(schedule.attention_chunks):
            halved = {BlockTask("Ax", block, chunk), BlockTask("Aw", block, chunk)} & seen
            yield from (BlockTask(kind, block, chunk) for kind in ("A", "G", "G'", *_back("A", bool(halved))))
        for chunk in range(schedule.expert_chunks):
            halved = {BlockTask("Ex", block, chunk), BlockTask("Ew", block, chunk)} & seen
            yield from (BlockTask(kind, block, chunk) for kind in (*wires, "E", *_back("E", bool(halved))))
        yield from (BlockTask(kind, block, piece) for kind, count in pieces.items() for piece in range(count))


def _back(kind: str, halved: bool) -> tuple[str, ...]:
    return (f"{kind}x", f"{kind}w") if halved else (f"{kind}'",)


def _before(schedule: BlockSchedule, task: BlockTask, present: frozenset[BlockTask]) -> Iterator[BlockTask]:
    """What a task needs; names of both forms of a backward pass, of which only one is there."""
    kind, block, chunk = task
    ra, re_ = schedule.attention_chunks, schedule.expert_chunks
    last, two = schedule.blocks - 1, bool(schedule.inner)

    def experts(*kinds: str, at: int = block, all_of: bool = False) -> Iterator[BlockTask]:
        chunks = range(re_) if all_of else schedule.sharing(chunk, of=ra, among=re_)
        return (BlockTask(one, at, each) for one in kinds for each in chunks)

    def attention(*kinds: str, at: int = block, all_of: bool = False) -> Iterator[BlockTask]:
        chunks = range(ra) if all_of else schedule.sharing(chunk, of=re_, among=ra)
        return (BlockTask(one, at, each) for one in kinds for each in chunks)

    chain = {"G": ("A",), "N": ("D",), "E": ("N",) if two else ("D",), "M": ("E",), "C": ("M",) if two else ("E",)}
    chain |= {"M'": ("C'",), "N'": ("E'", "Ex"), "D'": ("N'",) if two else ("E'", "Ex")}
    chain |= dict.fromkeys(("E'", "Ex"), ("M'",) if two else ("C'",)) | dict.fromkeys(("A'", "Ax"), ("G'",))
    chain |= {"Ew": ("Ex",), "Aw": ("Ax",)}
    yield from (BlockTask(one, block, chunk) for one in chain.get(kind, ()))
    if kind == "A":
        yield from experts("C", at=block - 1)
        yield from (one for one in schedule.carried if one.block == block)
        if schedule.cut == "sequence":
            yield BlockTask("A", block, chunk - 1)
        if schedule.window is not None and block == 0:
            done = chunk - schedule.window
            yield from (one for one in present if one.chunk == done and one.kind in ("E'", "Ew", "A'", "Aw"))
    elif kind == "D":
        yield from attention("G")
    elif kind == "C'" and block == last:
        all_of = schedule.turn == "whole"
        yield from (BlockTask("C", block, each) for each in (range(re_) if all_of else (chunk,)))
    elif kind == "C'":
        yield from attention("A'", "Ax", at=block + 1)
    elif kind == "G'":
        yield from experts("D'")
    elif kind in ("A'", "Ax") and schedule.cut == "sequence":
        yield from (BlockTask(one, block, chunk + 1) for one in ("A'", "Ax"))
    elif kind == "Ra":
        yield from attention("A'", "Aw", all_of=True)
    elif kind == "Re":
        yield from experts("E'", "Ew", all_of=True)


def _stuck(schedule: BlockSchedule) -> list[BlockTask]:
    """A ring of tasks that wait for each other; empty where there is none."""
    waits = {task: list(needed) for task, needed in schedule.needs().items()}
    for order in schedule.order.values():
        for first, then in itertools.pairwise(order):
            waits[then].append(first)
    left, then_of = {task: len(needed) for task, needed in waits.items()}, {task: [] for task in waits}
    for task, needed in waits.items():
        for one in needed:
            then_of[one].append(task)
    free = [task for task, count in left.items() if not count]
    while free:
        done = free.pop()
        del left[done]
        for task in then_of[done]:
            left[task] -= 1
            if not left[task]:
                free.append(task)
    ring: list[BlockTask] = []
    task = next(iter(left), None)
    while task is not None and task not in ring:
        ring.append(task)
        task = next(one for one in waits[task] if one in left)
    return ring[ring.index(task) :] if task is not None else []
