"""StageCosts: how long each stage's actions take, what they hold, and what travels between devices."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Self

from turnout.errors import UsageError, word

__all__ = ["StageCosts"]

_WHERE = "turnout.types.StageCosts"
_STAGES = ("forward_S", "input_S", "weight_S", "activation_S", "gather_S", "parameters_S")
_SHARES = ("kept", "together")


@dataclasses.dataclass(frozen=True)
class StageCosts:
    """What the actions of a pipeline's S stages cost, for one microbatch; times in one unit, memory in another.

    Args:
        forward_S: of F.
        input_S: of I, the gradient of the input. B takes I + W.
        weight_S: of W, the gradient of the weights.
        send: how long activations or gradients travel to another device, which computes meanwhile.
        overhead: what every action takes beside its own time, as calibrated on an engine.
        together: what F and B done together (``OVERLAP_F_B``) take, as a share of one after the other.
        activation_S: what a microbatch holds from its F on; None for 1 a stage.
        kept: the share of it that stays after I until W has used it.
        gather_S: how long UNSHARD takes, beside computing; None for 0.
        parameters_S: what a stage's gathered parameters hold; None for 0.

    Raises:
        UsageError: another number of stages in some, a negative or endless cost, a share above 1.

    >>> StageCosts.even(4, forward=1.0, input=1.0, weight=0.5).full_S
    (1.5, 1.5, 1.5, 1.5)

    Source: Qi et al., 2024, "Zero Bubble Pipeline Parallelism": T_F, T_B, T_W, T_comm, M_B and M_W.
    """

    forward_S: tuple[float, ...]
    input_S: tuple[float, ...]
    weight_S: tuple[float, ...]
    send: float = 0.0
    overhead: float = 0.0
    together: float = 1.0
    activation_S: tuple[float, ...] | None = None
    kept: float = 0.5
    gather_S: tuple[float, ...] | None = None
    parameters_S: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in (*_STAGES, "send", "overhead", *_SHARES):
            value = getattr(self, name)
            if value is None:
                continue
            each = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(one, int | float) and math.isfinite(one) and one >= 0 for one in each):
                fix = "measure it, or pass 0"
                raise UsageError(word(name, got=value, allowed="be finite and not negative", where=_WHERE, fix=fix))
            if name in _STAGES and len(each) != len(self.forward_S):
                got, fix = f"{len(each)} for {len(self.forward_S)} stages", "give a number for each stage"
                raise UsageError(word(name, got=got, allowed="have one number a stage", where=_WHERE, fix=fix))
            if name in _SHARES and not 0 <= value <= 1:
                raise UsageError(word(name, got=value, allowed="be in [0, 1]", where=_WHERE, fix=f"pass {name}=1"))

    @property
    def stages(self) -> int:
        """S."""
        return len(self.forward_S)

    @property
    def full_S(self) -> tuple[float, ...]:
        """Of B."""
        return tuple(i + w for i, w in zip(self.input_S, self.weight_S, strict=True))

    @property
    def held_S(self) -> tuple[float, ...]:
        """What a microbatch holds in each stage, 1 where nothing else is known."""
        return (1.0,) * self.stages if self.activation_S is None else self.activation_S

    @classmethod
    def even(
        cls,
        stages: int,
        *,
        forward: float = 1.0,
        input: float = 1.0,
        weight: float = 1.0,
        send: float = 0.0,
        overhead: float = 0.0,
        together: float = 1.0,
        activation: float = 1.0,
        kept: float = 0.5,
        gather: float = 0.0,
        parameters: float = 0.0,
    ) -> Self:
        """The same for every stage; each argument is what a stage takes."""
        each = [(value,) * stages for value in (forward, input, weight, activation, gather, parameters)]
        return cls(
            each[0],
            each[1],
            each[2],
            send=send,
            overhead=overhead,
            together=together,
            activation_S=each[3],
            kept=kept,
            gather_S=each[4],
            parameters_S=each[5],
        )

    @classmethod
    def cut(cls, whole: "StageCosts", into: int) -> "StageCosts":
        """The same network in ``into`` times as many stages: every stage cut into even parts; messages stay as long."""
        if into < 1:
            raise UsageError(word("into", got=into, allowed="be at least 1", where=f"{_WHERE}.cut", fix="pass into=2"))

        def parts(value_S: Sequence[float]) -> tuple[float, ...]:
            return tuple(value / into for value in value_S for _ in range(into))

        return dataclasses.replace(
            whole,
            forward_S=parts(whole.forward_S),
            input_S=parts(whole.input_S),
            weight_S=parts(whole.weight_S),
            activation_S=parts(whole.held_S),
            gather_S=None if whole.gather_S is None else parts(whole.gather_S),
            parameters_S=None if whole.parameters_S is None else parts(whole.parameters_S),
        )
