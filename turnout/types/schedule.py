"""Schedule: what each device of a pipeline does, in which order; torch's text form, and a check that it can run."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Self

from turnout.errors import CheckpointError, UsageError, word

__all__ = ["Action", "Schedule"]

_FORMAT, _WHERE = "turnout.schedule/1", "turnout.types.Schedule"
_COMPUTE = ("F", "I", "W", "B")
_KINDS = (*_COMPUTE, "UNSHARD", "RESHARD")
_OVERLAP = "OVERLAP_F_B"
_TEXT = re.compile(r"(\d+)(UNSHARD|RESHARD|F|I|W|B)(\d*)")


class Action(NamedTuple):
    """One thing that a device does for one stage.

    Attributes:
        stage: the stage, in [0, stages); -1 for two actions at a time.
        kind: ``F`` forward, ``I`` the gradient of the input, ``W`` that of the weights, ``B`` both of these in one,
            ``UNSHARD`` and ``RESHARD`` gather and drop a stage's parameters, ``OVERLAP_F_B`` does ``parts`` together.
        microbatch: in [0, microbatches); None for the parameters.
        parts: the F and the B (or I) of ``OVERLAP_F_B``.

    >>> str(Action(2, "F", 0)), Action.parse("(0F1;3B0)OVERLAP_F_B").parts[1]
    ('2F0', Action(stage=3, kind='B', microbatch=0, parts=()))

    Source: the text form of ``torch.distributed.pipelining.schedules``, 2.13.
    """

    stage: int
    kind: str
    microbatch: int | None = None
    parts: tuple["Action", ...] = ()

    def __str__(self) -> str:
        if self.parts:
            return f"({';'.join(map(str, self.parts))}){self.kind}"
        return f"{self.stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """The action of a text such as ``2F0``.

        Raises:
            CheckpointError: the text is none.
        """
        text = text.strip()
        inside, close, kind = text.removeprefix("(").partition(")")
        if text.startswith("(") and close and kind == _OVERLAP:
            return cls(-1, _OVERLAP, None, tuple(cls.parse(part) for part in inside.split(";")))
        match = _TEXT.fullmatch(text)
        if not match:
            allowed, fix = "be a stage, a kind and a microbatch", "write 2F0 for the forward of stage 2, microbatch 0"
            raise CheckpointError(word("an action", got=f"{text!r:.40}", allowed=allowed, where=_WHERE, fix=fix))
        stage, kind, microbatch = match.groups()
        return cls(int(stage), kind, int(microbatch) if microbatch else None)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The order in which each device works through its stages' microbatches; whatever the durations, it can run.

    Args:
        name: which schedule this is.
        actions: for each device its actions in order.
        rank_of_stage: for each stage the device that holds it.
        microbatches: how many there are.

    Raises:
        UsageError: an action that is missing, done twice, on another device than its stage, before what it needs, or
            orders that wait for each other.

    >>> one = Schedule("1F1B", ((Action(0, "F", 0), Action(0, "B", 0)),), (0,), 1)
    >>> one.to_csv().strip(), Schedule.from_csv(one.to_csv(), name="1F1B") == one
    ('0F0,0B0', True)

    Source: Huang et al., 2019, "GPipe", for the pipeline; Qi et al., 2024, "Zero Bubble Pipeline Parallelism", for I
    and W as actions of their own (their B and W).
    """

    name: str
    actions: tuple[tuple[Action, ...], ...]
    rank_of_stage: tuple[int, ...]
    microbatches: int

    def __post_init__(self) -> None:
        if self.microbatches < 1 or not self.actions or not self.rank_of_stage:
            got = f"{self.microbatches} microbatches, {self.stages} stages, {self.ranks} devices"
            raise _refuse("a schedule", got, "have at least one of each", "give a microbatch, a stage and a device")
        strange = [rank for rank in self.rank_of_stage if not 0 <= rank < self.ranks]
        if strange:
            allowed, fix = f"be in [0, {self.ranks})", "give orders for every device"
            raise _refuse("rank_of_stage", strange[0], allowed, fix)
        done = self._once()
        _check_complete(done, self.stages, self.microbatches)
        _check_gathered(self)
        _check_order(self)

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return len(self.rank_of_stage)

    @property
    def ranks(self) -> int:
        """How many devices there are."""
        return len(self.actions)

    @property
    def splits_backward(self) -> bool:
        """Whether any backward pass is done as I and W apart."""
        return any(part.kind == "W" for order in self.actions for action in order for part in parts_of(action))

    def count(self, kind: str) -> int:
        """How many actions of that kind all devices do, those within pairs included."""
        return sum(part.kind == kind for order in self.actions for action in order for part in parts_of(action))

    def _once(self) -> set[tuple[int, str, int]]:
        """All (stage, kind, microbatch) of computing; refuses a second one, and one in the wrong place."""
        done: set[tuple[int, str, int]] = set()
        for rank, order in enumerate(self.actions):
            for action in order:
                for stage, kind, microbatch, _ in parts_of(action):
                    if kind not in _KINDS or not 0 <= stage < len(self.rank_of_stage):
                        allowed = f"be one of {', '.join(_KINDS)} of a stage below {self.stages}"
                        raise _refuse("an action", str(action), allowed, "write actions as 2F0")
                    if self.rank_of_stage[stage] != rank:
                        allowed = f"be on device {self.rank_of_stage[stage]}, which holds stage {stage},"
                        raise _refuse(f"{action}", f"device {rank}", allowed, "move it, or change rank_of_stage")
                    if kind in _COMPUTE:
                        if microbatch is None or not 0 <= microbatch < self.microbatches:
                            allowed = f"be of a microbatch below {self.microbatches}"
                            raise _refuse("an action", str(action), allowed, "number microbatches from 0")
                        if (stage, kind, microbatch) in done:
                            raise _refuse("an action", f"{action} twice", "be done once", "leave out the second")
                        done.add((stage, kind, microbatch))
        return done

    def to_csv(self) -> str:
        """A line of comma-separated actions for each device, as torch's pipelines read it."""
        return "".join(",".join(map(str, order)) + "\n" for order in self.actions)

    @classmethod
    def from_csv(cls, text: str, *, name: str) -> Self:
        """The schedule that a table of actions, one line a device, is; empty cells are skipped.

        Raises:
            CheckpointError: a cell that is no action.
            UsageError: the actions are no schedule.
        """
        cells = [[cell for cell in line.split(",") if cell.strip()] for line in text.strip().splitlines()]
        return cls.of(name, [[Action.parse(cell) for cell in line] for line in cells])

    @classmethod
    def of(cls, name: str, actions: Iterable[Iterable[Action]]) -> Self:
        """The schedule of these orders; who holds which stage, and how many microbatches there are, is read off them.

        Raises:
            UsageError: the actions are no schedule.
        """
        orders = tuple(tuple(order) for order in actions)
        holder: dict[int, int] = {}
        last = -1
        for rank, order in enumerate(orders):
            for action in order:
                for part in parts_of(action):
                    holder.setdefault(part.stage, rank)
                    last = max(last, -1 if part.microbatch is None else part.microbatch)
        missing = sorted(set(range(len(holder))) - set(holder))
        if missing:
            fix = "number the stages from 0 without a gap"
            raise _refuse("a schedule", f"no action of stage {missing[0]}", "have actions of every stage", fix)
        return cls(name, orders, tuple(holder[stage] for stage in range(len(holder))), last + 1)

    def to_json_dict(self) -> dict[str, object]:
        """The schedule as plain JSON values; actions in torch's text form."""
        orders = [" ".join(map(str, order)) for order in self.actions]
        head: dict[str, object] = {"format": _FORMAT, "name": self.name, "microbatches": self.microbatches}
        return head | {"rank_of_stage": list(self.rank_of_stage), "actions": orders}

    @classmethod
    def from_json_dict(cls, body: dict[str, object], where: str = "schedule.json") -> Self:
        """The schedule that ``to_json_dict`` gave.

        Raises:
            CheckpointError: the values are none.
            UsageError: the actions are no schedule.
        """
        name, count = body.get("name"), body.get("microbatches")
        holder, orders = body.get("rank_of_stage"), body.get("actions")
        whole = isinstance(holder, list) and all(type(rank) is int for rank in holder)
        texts = isinstance(orders, list) and all(isinstance(order, str) for order in orders)
        if body.get("format") != _FORMAT or not (isinstance(name, str) and type(count) is int and whole and texts):
            allowed, fix = f"be {_FORMAT} JSON", "write it with Schedule.to_json_dict"
            raise CheckpointError(word(where, got=f"{body!r:.80}", allowed=allowed, where=_WHERE, fix=fix))
        assert isinstance(holder, list) and isinstance(orders, list)
        actions = tuple(tuple(Action.parse(text) for text in order.split()) for order in orders)
        return cls(name, actions, tuple(holder), count)

    @property
    def digest(self) -> str:
        """A hash of all of it but the name, which devices compare before they begin."""
        body = {key: value for key, value in self.to_json_dict().items() if key != "name"}
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def parts_of(action: Action) -> tuple[Action, ...]:
    """The action alone, or the two that it does together."""
    return action.parts or (action,)


def _refuse(what: str, got: object, allowed: str, fix: str) -> UsageError:
    shown = got if isinstance(got, str) else repr(got)
    return UsageError(word(what, got=shown, allowed=allowed, where=_WHERE, fix=fix))


def _check_complete(done: set[tuple[int, str, int]], stages: int, microbatches: int) -> None:
    """Every stage's every microbatch forward, and backward as B or as I and W."""
    for stage in range(stages):
        for microbatch in range(microbatches):
            kinds = "".join(kind for kind in _COMPUTE if (stage, kind, microbatch) in done)
            if kinds not in ("FB", "FIW"):
                got, allowed = f"{kinds or 'none'} of microbatch {microbatch}", "be F and B, or F, I and W"
                raise _refuse(f"the actions of stage {stage}", got, allowed, "add what is missing, leave out the rest")


def _check_gathered(schedule: Schedule) -> None:
    """A stage whose parameters are ever gathered computes while they are."""
    for order in schedule.actions:
        sharded = {action.stage for action in order if action.kind == "UNSHARD"}
        there: set[int] = set()
        for action in order if sharded else ():
            if action.kind == "UNSHARD":
                there.add(action.stage)
            elif action.kind == "RESHARD":
                there.discard(action.stage)
            for stage, kind, _, _ in parts_of(action):
                if kind in _COMPUTE and stage in sharded and stage not in there:
                    allowed, fix = "come between its stage's UNSHARD and RESHARD", f"put {stage}UNSHARD before it"
                    raise _refuse(str(action), "no UNSHARD since the last RESHARD", allowed, fix)


def _check_order(schedule: Schedule) -> None:
    """Plays the orders, each device as far as it can: at the end all have to be through."""
    done: set[tuple[int, str, int]] = set()
    waiting: dict[tuple[int, str, int], list[int]] = {}
    place, todo = [0] * schedule.ranks, list(range(schedule.ranks))
    while todo:
        rank = todo.pop()
        order = schedule.actions[rank]
        while place[rank] < len(order):
            parts = order[place[rank]].parts or (order[place[rank]],)
            lacks = next((n for part in parts for n in _needs(part, schedule.stages) if n not in done), None)
            if lacks is not None:
                waiting.setdefault(lacks, []).append(rank)
                break
            place[rank] += 1
            for part in parts:
                for key in _gives(part):
                    done.add(key)
                    todo += waiting.pop(key, ())
    stuck = [(rank, place[rank]) for rank in range(schedule.ranks) if place[rank] < len(schedule.actions[rank])]
    if stuck:
        heads = ", ".join(f"device {rank} at {schedule.actions[rank][at]}" for rank, at in stuck[:4])
        fix = "put each forward after the stage before's, and each backward after the stage behind's"
        raise _refuse("the orders", f"all waiting: {heads}", "let every action come after what it needs", fix)


def _needs(action: Action, stages: int) -> Iterator[tuple[int, str, int]]:
    """What has to be done before; G stands for the gradient of a stage's input, from I or B."""
    stage, kind, microbatch, _ = action
    if microbatch is None:
        return
    if kind == "F" and stage:
        yield stage - 1, "F", microbatch
    elif kind in ("I", "B"):
        yield stage, "F", microbatch
        if stage + 1 < stages:
            yield stage + 1, "G", microbatch
    elif kind == "W":
        yield stage, "G", microbatch


def _gives(action: Action) -> Sequence[tuple[int, str, int]]:
    stage, kind, microbatch, _ = action
    if microbatch is None or kind == "W":
        return ()
    return ((stage, "F" if kind == "F" else "G", microbatch),)
