"""Cost and Budget: the bill of a decision, and what it was allowed."""

import dataclasses
from typing import Self

from turnout.errors import UsageError, word


@dataclasses.dataclass(frozen=True)
class Cost:
    """What running something takes. A field is None where it is not known; unknown plus known is unknown.

    Args:
        params: parameters held.
        params_active: parameters that one token uses.
        flops: floating-point operations of the work described (a multiply-add counts 2).
        memory_bytes: bytes held or moved, as the maker of the cost says.
        latency_ms: wall-clock milliseconds.
        money: in whatever unit the caller prices with.

    >>> Cost(params=10, flops=4.0) + Cost(params=5, flops=6.0)
    Cost(params=15, flops=10.0)

    Source: none; plain bookkeeping.
    """

    params: int | None = None
    params_active: int | None = None
    flops: float | None = None
    memory_bytes: int | None = None
    latency_ms: float | None = None
    money: float | None = None

    def __add__(self, other: Self) -> Self:
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return type(self)(**{name: None if a is None or b is None else a + b for name, a, b in pairs})

    def __mul__(self, times: int) -> Self:
        values = dataclasses.asdict(self).items()
        return type(self)(**{name: None if value is None else value * times for name, value in values})

    def __repr__(self) -> str:
        known = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        return f"Cost({', '.join(f'{name}={value!r}' for name, value in known if value is not None)})"


@dataclasses.dataclass(frozen=True)
class Budget:
    """The most that each field of a Cost may be; None leaves it free.

    >>> Budget(flops=5.0).allows(Cost(flops=4.0)), Budget(flops=5.0).allows(Cost(flops=6.0))
    (True, False)

    Source: none; plain bookkeeping.
    """

    params: int | None = None
    params_active: int | None = None
    flops: float | None = None
    memory_bytes: int | None = None
    latency_ms: float | None = None
    money: float | None = None

    def allows(self, cost: Cost) -> bool:
        """Whether every limited field of the cost is known and within its limit.

        Raises:
            UsageError: a limited field of the cost is unknown, so that nothing can be said.
        """
        for field in dataclasses.fields(self):
            limit, spent = getattr(self, field.name), getattr(cost, field.name)
            if limit is None:
                continue
            if spent is None:
                raise UsageError(
                    word(
                        f"cost.{field.name}",
                        got="unknown",
                        allowed=f"be known, since the budget limits it to {limit}",
                        where="Budget.allows",
                        fix=f"measure {field.name}, or leave it out of the budget",
                    )
                )
            if spent > limit:
                return False
        return True
