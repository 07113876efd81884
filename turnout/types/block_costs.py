"""BlockCosts: what each kind of task of a sparse block takes on a machine, as it was profiled there."""

import dataclasses
import math
from typing import Literal, Self

from turnout.errors import UsageError, word
from turnout.fields import build, plain
from turnout.types.block_schedule import BlockSchedule, BlockTask

__all__ = ["BlockCosts", "Line"]

_WHERE = "turnout.types.BlockCosts"


@dataclasses.dataclass(frozen=True)
class Line:
    """Time as a line: ``start_s`` seconds for a task whatever its size, and ``each_s`` for each row or byte.

    >>> Line(0.5, 0.25)(2)
    1.0

    Source: Hockney, 1994, "The communication challenge for MPP": alpha + beta n.
    """

    start_s: float = 0.0
    each_s: float = 0.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(one) and one >= 0 for one in (self.start_s, self.each_s)):
            fix = "profile it again; a fit below 0 is 0"
            raise UsageError(word("a line", got=self, allowed="be finite and not below 0", where=_WHERE, fix=fix))

    def __call__(self, size: float) -> float:
        """The seconds of a task of this size."""
        return self.start_s + self.each_s * size

    @property
    def is_none(self) -> bool:
        """Whether it takes no time at all."""
        return self.start_s == self.each_s == 0


@dataclasses.dataclass(frozen=True)
class BlockCosts:
    """The profiled cost of every kind of task of one block, on one device and its wires.

    Args:
        rows: tokens of a device's batch; chunks are parts of them.
        attention: forward, a row. Its name is ``A`` in a schedule.
        gate: gate and permute, ``G``.
        dispatch: the all-to-all to the experts, ``D``.
        experts: forward, ``E``.
        combine: the all-to-all back, ``C``.
        attention_input: the gradient of attention's input, ``Ax``.
        attention_weight: the gradient of its weights, ``Aw``.
        attention_back: both at once, ``A'``, which starts once, not twice.
        gate_back: ``G'``.
        experts_input: ``Ex``.
        experts_weight: ``Ew``.
        experts_back: both at once, ``E'``.
        reduce: a piece of the gradient's all-reduce (or reduce-scatter), a byte.
        dense_bytes: a block's dense gradient, attention's and gate's and norms'.
        expert_bytes: what is to be reduced of a block's experts' gradient; 0 where each expert is on one device.
        dispatch_inner: the part of a dispatch inside the node, ``N``; none where all-to-alls have one stage.
        combine_inner: the same of a combine, ``M``.
        compute_slowed: how much more time compute takes while a wire is busy: 0.1 is a tenth more.
        wire_slowed: how much more time a wire takes while compute is busy.
        cut: what chunks are parts of.
        sums: whether the loss is a sum over rows, so that a chunk's backward pass may begin before the others' forward
            pass has ended.
        most_chunks: the most parts the rows can be cut into: sequences of the batch, for instance.

    Raises:
        UsageError: a number that cannot be.

    >>> costs = BlockCosts.even(attention=1.0, experts=1.0, dispatch=0.5, reduce=0.5)
    >>> costs.compute_s(), costs.wire_s()
    (6.0, 2.5)

    Source: Pan et al., 2025, "FSMoE": t = alpha + beta n of each operation, profiled online.
    """

    rows: int
    attention: Line
    gate: Line
    dispatch: Line
    experts: Line
    combine: Line
    attention_input: Line
    attention_weight: Line
    attention_back: Line
    gate_back: Line
    experts_input: Line
    experts_weight: Line
    experts_back: Line
    reduce: Line
    dense_bytes: int
    expert_bytes: int = 0
    dispatch_inner: Line = Line()
    combine_inner: Line = Line()
    compute_slowed: float = 0.0
    wire_slowed: float = 0.0
    cut: Literal["batch", "sequence"] = "batch"
    sums: bool = True
    most_chunks: int = 16

    def __post_init__(self) -> None:
        for name in ("rows", "most_chunks", "dense_bytes", "expert_bytes", "compute_slowed", "wire_slowed"):
            value, least = getattr(self, name), int(name in ("rows", "most_chunks"))
            if not math.isfinite(value) or value < least:
                fix = f"pass {name}={least}"
                raise UsageError(word(name, got=value, allowed=f"be at least {least}", where=_WHERE, fix=fix))
        if self.dispatch_inner.is_none != self.combine_inner.is_none:
            got = (self.dispatch_inner, self.combine_inner)
            allowed, fix = "both take time, or neither", "profile both, or leave both out"
            raise UsageError(word("the inner wire", got=got, allowed=allowed, where=_WHERE, fix=fix))

    @classmethod
    def even(
        cls,
        *,
        attention: float,
        experts: float,
        dispatch: float,
        reduce: float,
        gate: float = 0.0,
        start: float = 0.0,
        expert_reduce: float = 0.0,
        inner: float = 0.0,
        rows: int = 1 << 20,
        most_chunks: int = 16,
    ) -> Self:
        """Costs from a few times in seconds for the whole batch. A backward pass takes twice its forward pass, half of
        that for the input and half for the weights; a combine takes what a dispatch does; a task ``start`` more.
        A gate of 0 is counted with attention.

        >>> BlockCosts.even(attention=1.0, experts=2.0, dispatch=0.5, reduce=0.25).experts_back(1 << 20)
        4.0
        """

        def line(seconds: float) -> Line:
            return Line(start, seconds / rows) if seconds else Line()

        one, wire = 1 << 20, line(dispatch)
        inside = line(inner)
        return cls(
            rows=rows,
            attention=line(attention),
            gate=line(gate),
            dispatch=wire,
            experts=line(experts),
            combine=wire,
            attention_input=line(attention),
            attention_weight=line(attention),
            attention_back=line(2 * attention),
            gate_back=line(gate),
            experts_input=line(experts),
            experts_weight=line(experts),
            experts_back=line(2 * experts),
            reduce=Line(start, max(reduce, expert_reduce) / one),
            dense_bytes=_part(reduce, max(reduce, expert_reduce), one),
            expert_bytes=_part(expert_reduce, max(reduce, expert_reduce), one),
            dispatch_inner=inside,
            combine_inner=inside,
            most_chunks=most_chunks,
        )

    def line(self, kind: str) -> Line:
        """The line of a kind of task, by its name in a schedule."""
        return getattr(self, _FIELD[kind])

    def seconds(self, task: BlockTask, schedule: BlockSchedule) -> float:
        """What a task takes while nothing else runs."""
        if task.kind in ("Ra", "Re"):
            return self.reduce((schedule.dense_bytes if task.kind == "Ra" else schedule.expert_bytes)[task.chunk])
        parts = schedule.attention_chunks if task.kind[0] in "AG" else schedule.expert_chunks
        return self.line(task.kind)(self.part(task.chunk, parts))

    def part(self, chunk: int, parts: int) -> int:
        """The rows of part ``chunk`` of ``parts``."""
        return (chunk + 1) * self.rows // parts - chunk * self.rows // parts

    @property
    def two_wires(self) -> bool:
        """Whether all-to-alls have a stage inside the node."""
        return not self.dispatch_inner.is_none

    def compute_s(self) -> float:
        """A block's work on the chip, forward and backward, each kind started once: no schedule has less."""
        return sum(self.line(kind)(self.rows) for kind in ("A", "G", "E", "E'", "G'", "A'"))

    def wire_s(self) -> float:
        """A block's work on the wire, likewise."""
        reductions = sum(self.reduce(size) for size in (self.dense_bytes, self.expert_bytes) if size)
        return sum(self.line(kind)(self.rows) for kind in ("D", "C", "C'", "D'")) + reductions

    def inner_s(self) -> float:
        """A block's work on the wire inside the node."""
        return sum(self.line(kind)(self.rows) for kind in ("N", "M", "M'", "N'"))

    def bound_s(self, blocks: int) -> float:
        """What no schedule of so many blocks can be below: the busiest resource alone, without a gap."""
        return blocks * max(self.compute_s(), self.wire_s(), self.inner_s())

    def to_json_dict(self) -> dict[str, object]:
        """The costs as plain JSON values."""
        return plain(self)

    @classmethod
    def from_json_dict(cls, body: dict[str, object], where: str = "costs.json") -> Self:
        """The costs that ``to_json_dict`` gave.

        Raises:
            CheckpointError: not a mapping.
            UsageError: a field that is not right.
        """
        return build(cls, body, where)


# The field of each kind of task. The backward pass of an all-to-all moves the same rows the other way.
_FIELD = {"A": "attention", "G": "gate", "D": "dispatch", "E": "experts", "C": "combine", "C'": "combine"}
_FIELD |= {"D'": "dispatch", "N": "dispatch_inner", "N'": "dispatch_inner", "M": "combine_inner", "M'": "combine_inner"}
_FIELD |= {"E'": "experts_back", "Ex": "experts_input", "Ew": "experts_weight", "G'": "gate_back"}
_FIELD |= {"A'": "attention_back", "Ax": "attention_input", "Aw": "attention_weight"}


def _part(seconds: float, of: float, whole: int) -> int:
    return round(whole * seconds / of) if of else 0
