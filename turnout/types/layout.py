"""Layout: how many devices each kind of parallelism takes, and what of the training state is sharded."""

import dataclasses
from typing import Literal

from turnout.errors import UsageError, word

__all__ = ["Layout"]

_WHERE = "turnout.types.Layout"
_FIELDS = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The degrees of every kind of parallelism over ``world`` devices, numbered through tp fastest and pp slowest.

    Attention and everything dense is laid out over (pp, dp_replicate, dp_shard, cp, tp). Experts are laid out apart:
    in each pipeline stage and replica the dp_shard x cp x tp devices are folded into ``efsdp`` x ``ep``, ep fastest,
    so that expert e of E belongs to the ep-rank e // (E / ep) and is sharded over efsdp.

    Args:
        pp: pipeline stages' devices, P.
        dp_replicate: copies of everything that work on other data.
        dp_shard: devices that work on other data and share one sharded copy, as ``zero`` says.
        cp: devices that share a sequence.
        tp: devices that share each matrix.
        ep: devices that share the experts of a layer; divides dp_shard x cp x tp.
        zero: what the dp_shard devices split among them: 0 nothing, 1 the optimizer's state, 2 the gradients too, 3 the
            parameters too.

    Raises:
        UsageError: a degree below 1, or an ep that does not divide.

    >>> layout = Layout(dp_shard=4, ep=2)
    >>> layout.world, layout.efsdp, layout.data_ranks
    (4, 2, 4)

    Source: Liu et al., 2025, "MoE Parallel Folding", for the experts' own mesh; Rajbhandari et al., 2020, "ZeRO".
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    zero: Literal[0, 1, 2, 3] = 3

    def __post_init__(self) -> None:
        for name in _FIELDS:
            degree = getattr(self, name)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                fix = f"pass {name}=1 for none of it"
                raise UsageError(
                    word(name, got=degree, allowed="be a whole number of at least 1", where=_WHERE, fix=fix)
                )
        if self.zero not in (0, 1, 2, 3):
            fix = "pass zero=3 to shard the parameters too"
            raise UsageError(word("zero", got=self.zero, allowed="be 0, 1, 2 or 3", where=_WHERE, fix=fix))
        if self.folded % self.ep:
            near = max(each for each in range(1, self.ep + 1) if self.folded % each == 0)
            allowed = f"divide dp_shard x cp x tp = {self.folded}, the devices that it is folded from,"
            raise UsageError(word("ep", got=self.ep, allowed=allowed, where=_WHERE, fix=f"pass ep={near}"))

    @property
    def folded(self) -> int:
        """How many devices experts are folded over: dp_shard x cp x tp."""
        return self.dp_shard * self.cp * self.tp

    @property
    def efsdp(self) -> int:
        """How many devices share one sharded copy of the same experts."""
        return self.folded // self.ep

    @property
    def data_ranks(self) -> int:
        """How many parts a batch is cut into: dp_replicate x dp_shard."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        """How many devices it takes."""
        return self.pp * self.dp_replicate * self.folded

    def __str__(self) -> str:
        degrees = [f"{name}={getattr(self, name)}" for name in _FIELDS if getattr(self, name) > 1]
        return " ".join([*degrees, *([f"zero={self.zero}"] if self.dp_shard > 1 else [])]) or "one device"
