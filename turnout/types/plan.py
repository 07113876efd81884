"""Plan: all that has to be agreed on before many processes train one model; what a planner writes and ranks play."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from turnout.errors import CheckpointError, UsageError, word
from turnout.fields import build, plain
from turnout.reading import read_json
from turnout.storage import write_whole
from turnout.types.block_schedule import BlockSchedule
from turnout.types.layout import Layout
from turnout.types.placement import Placement
from turnout.types.schedule import Schedule

__all__ = ["Plan"]

_FORMAT, _WHERE = "turnout.plan/1", "turnout.types.Plan"
# Of torch's schedules, those whose backward pass comes in two parts.
SPLITTING = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
_PARTS: dict[str, Any] = {"actions": Schedule, "overlap": BlockSchedule, "placement": Placement}


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a model is trained on many devices.

    Args:
        layout: the degrees of parallelism.
        schedule: the name of a pipeline schedule, as torch has it or of ``turnout.decide.device``.
        microbatches: how many parts of a step's batch go through the pipeline.
        stages: how many blocks each stage has, in order; pp x (stages of one device) of them. None for even ones.
        gather: how the parameters travel when they are gathered: as they are, in bf16, or as blockwise int8.
        reduce: how gradients travel: as they are, in bf16, or as blockwise int4.
        recompute: whether of each block only its input is kept, and the block run again for its backward pass; not with
            schedules that split that pass.
        actions: the pipeline's schedule in full, in the place of one known by its name.
        overlap: the order of a block's tasks on the chip and on the wire; None for one after the other.
        placement: which device of an ep group holds which experts; None for equal parts in their order.
        secondary: over how many devices parameters stay gathered between forward and backward pass; None for all or
            none, as ``layout.zero`` says.
        foreseen_s: the seconds that the planner foresaw for what ``overlap`` orders, once through and back; None where
            nobody did.

    Raises:
        UsageError: what does not go together.

    >>> plan = Plan(Layout(dp_shard=2, ep=2))
    >>> Plan.from_json_dict(plan.to_json_dict()) == plan
    True

    Source: none; plain bookkeeping.
    """

    layout: Layout = dataclasses.field(default_factory=Layout)
    schedule: str = "1F1B"
    microbatches: int = 1
    stages: tuple[int, ...] | None = None
    gather: Literal["full", "bf16", "int8"] = "full"
    reduce: Literal["full", "bf16", "int4"] = "full"
    secondary: int | None = None
    foreseen_s: float | None = None
    recompute: bool = False
    actions: Schedule | None = None
    overlap: BlockSchedule | None = None
    placement: Placement | None = None

    def __post_init__(self) -> None:
        def refuse(what: str, got: object, allowed: str, fix: str) -> UsageError:
            return UsageError(word(what, got=got, allowed=allowed, where=_WHERE, fix=fix))

        layout = self.layout
        if self.microbatches < 1:
            raise refuse("microbatches", self.microbatches, "be at least 1", f"pass microbatches={layout.pp}")
        if self.stages is not None and (len(self.stages) % layout.pp or min(self.stages, default=0) < 0):
            allowed = f"be whole numbers of blocks, a multiple of pp={layout.pp} of them"
            raise refuse("stages", self.stages, allowed, "leave stages out for even ones")
        if self.secondary is not None and (self.secondary < 1 or layout.dp_shard % self.secondary):
            allowed = f"divide dp_shard={layout.dp_shard}"
            raise refuse("secondary", self.secondary, allowed, "pass the number of devices in a node")
        if self.actions is not None and (self.actions.ranks, self.actions.microbatches) != (
            layout.pp,
            self.microbatches,
        ):
            got = f"a schedule of {self.actions.ranks} devices and {self.actions.microbatches} micro-batches"
            allowed, fix = f"be for pp={layout.pp} and microbatches={self.microbatches}", "leave actions out"
            raise refuse("actions", got, allowed, fix)
        splits = self.actions.splits_backward if self.actions else self.schedule in SPLITTING
        if self.recompute and layout.pp > 1 and splits:
            allowed = "be False with a schedule that splits the backward pass"
            raise refuse("recompute", True, allowed, "pass schedule='1F1B'")
        if self.placement is not None and self.placement.devices != layout.ep:
            got, fix = f"one over {self.placement.devices} devices", f"make one with --devices {layout.ep}"
            raise refuse("placement", got, f"be over the ep={layout.ep} devices that share the experts", fix)

    def to_json_dict(self) -> dict[str, object]:
        """The plan as plain JSON values."""
        whole = {name: getattr(self, name) for name in _PARTS}
        body = plain(dataclasses.replace(self, **dict.fromkeys(_PARTS)))
        return {"format": _FORMAT, **body, **{name: part and part.to_json_dict() for name, part in whole.items()}}

    @classmethod
    def from_json_dict(cls, body: dict[str, object], where: str = "plan.json") -> Self:
        """The plan that ``to_json_dict`` gave.

        Raises:
            CheckpointError: not a plan.
            UsageError: a field that is not right.
        """
        if body.get("format") != _FORMAT:
            got, allowed = f"format {body.get('format')!r:.40}", f"have format {_FORMAT!r}"
            fix = "write it with turnout plan"
            raise CheckpointError(word(where, got=got, allowed=allowed, where=_WHERE, fix=fix))
        fields = {name: value for name, value in body.items() if name != "format"}
        for name, kind in _PARTS.items():
            if fields.get(name) is not None:
                fields[name] = kind.from_json_dict(fields[name], f"{where}: {name}")
        kept = {name: fields.pop(name) for name in _PARTS if name in fields}
        return dataclasses.replace(build(cls, fields, where), **kept)

    @property
    def digest(self) -> str:
        """A hash of all of it, which ranks compare before they begin."""
        text = json.dumps(self.to_json_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Writes the JSON, whole or not at all."""
        write_whole(path, json.dumps(self.to_json_dict(), indent=2) + "\n")

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """The plan in a file.

        Raises:
            CheckpointError: there is none, or it is no plan.
        """
        path = Path(path)

        def refuse(problem: str) -> CheckpointError:
            allowed, fix = "be a plan that turnout plan wrote", "write one with: turnout plan MODEL --out plan.json"
            return CheckpointError(word("the plan", got=f"{path} ({problem})", allowed=allowed, where=_WHERE, fix=fix))

        try:
            body = read_json(path, refuse=refuse, any_link=True)
        except OSError as error:
            raise refuse(error.strerror or "unreadable") from error
        return cls.from_json_dict(body, str(path))
