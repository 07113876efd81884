"""Just one byte: replicas share their random directions, so that a gradient is one number, sent in one byte."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch import distributed as dist

from turnout.errors import TrainingError, UsageError, word

__all__ = ["OneByte", "Sent", "gather_bytes", "perturbed"]

_WHERE = "turnout.train.zeroth.OneByte"
Loss = Callable[[nn.Module], Tensor]


@dataclasses.dataclass(frozen=True)
class Sent:
    """One step of all machines: what everybody needs to take it again.

    Args:
        step: its number, from 0.
        bytes_by_machine: machine -> its projected gradient, -127 to 127.

    >>> Sent(0, {"a": 3}).bytes_by_machine["a"]
    3

    Source: Zelikman et al., 2023, "Just One Byte (per gradient)".
    """

    step: int
    bytes_by_machine: dict[str, int]


class Exchange(Protocol):
    """What gives everybody's byte for one's own."""

    def __call__(self, machine: str, byte: int) -> dict[str, int]:
        """Machine -> byte, for all that are there, this one too."""


class OneByte:
    """Zeroth-order training in which a machine sends one byte a step, and all replicas stay the same to the bit.

    In step t machine w draws z from a seed of (seed, w, t), measures g = (L(theta + eps z) - L(theta - eps z)) / 2 eps
    on its own data, and sends b = round(g / unit), between -127 and 127. Everybody draws every z again and takes
    theta <- theta - rate unit / W sum_w b_w z_w, in the order of the machines' names. No gradient and no activation is
    held: memory is that of inference, and one copy of what is trained while its loss is measured. The unit follows
    the largest byte, by a rule that everybody computes alike: a step in which one is at the limit doubles it, fifty
    steps in which none is beyond a quarter halve it.

    Args:
        model: changed in place; what asks for gradients is trained. All start alike.
        machine: this one's name, unlike all others.
        rate: of the step, above 0.
        eps: the perturbation, above 0.
        seed: shared by all.
        unit: the first value of one count of a byte, above 0.
        names: of the parameters to train; None is all that ask for gradients.

    Raises:
        UsageError: a setting out of range, or nothing to train.

    >>> pair = {name: OneByte(nn.Linear(2, 1), name, rate=0.1) for name in "ab"}
    >>> pair["b"].model.load_state_dict(pair["a"].model.state_dict())
    <All keys matched successfully>
    >>> for step in range(3):
    ...     sent = {n: one.measure(lambda model: model(torch.ones(1, 2)).square().sum()) for n, one in pair.items()}
    ...     done = [one.apply(sent) for one in pair.values()]
    >>> bool(torch.equal(pair["a"].model.weight, pair["b"].model.weight))
    True

    Source: Zelikman et al., 2023, "Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model
    Finetuning Using Shared Randomness"; the estimate is SPSA (Spall, 1992), in place as in MeZO (Malladi et al.,
    2023). Where we differ: the seed is of (machine, step), since a machine's batch is its loss; theirs is a web
    service that asks for CUDA; how a float becomes a byte the note leaves open. Parameters are put back from a copy:
    subtracting, as MeZO does, leaves rounding behind that differs between machines.
    """

    def __init__(
        self,
        model: nn.Module,
        machine: str,
        *,
        rate: float,
        eps: float = 1e-3,
        seed: int = 0,
        unit: float = 0.01,
        names: "Sequence[str] | None" = None,
    ) -> None:
        for what, got in (("rate", rate), ("eps", eps), ("unit", unit)):
            if not 0 < got < math.inf:
                fix = f"pass {what}=0.001"
                raise UsageError(word(what, got=got, allowed="be above 0 and finite", where=_WHERE, fix=fix))
        self.model, self.machine = model, machine
        self.rate, self.eps, self.seed, self.unit = rate, eps, seed, unit
        self.step, self._quiet = 0, 0
        named = dict(model.named_parameters())
        wanted = [name for name, one in named.items() if one.requires_grad] if names is None else list(names)
        unknown = [name for name in wanted if name not in named]
        if unknown or not wanted:
            got = f"{unknown[0]!r}, which it has not" if unknown else "none that asks for gradients"
            fix = "pass names out of model.named_parameters()"
            raise UsageError(word("the parameters", got=got, allowed="be of the model", where=_WHERE, fix=fix))
        self._trained = [named[name] for name in wanted]

    @torch.no_grad()
    def measure(self, loss: Loss) -> int:
        """This machine's byte for the step: two evaluations of ``loss``, and the model is as before to the bit.

        Args:
            loss: from the model to a scalar, on this machine's own data of this step; the same data both times.

        Raises:
            TrainingError: a loss that is not finite.
        """
        high, low = perturbed(self._trained, self._seed(self.machine), self.eps, lambda: float(loss(self.model)))
        slope = (high - low) / (2 * self.eps)
        if not math.isfinite(slope):
            got, fix = f"{high} and {low} in step {self.step}", "train with a lower rate"
            raise TrainingError(word("the losses", got=got, allowed="be finite", where=_WHERE, fix=fix))
        return max(-127, min(127, round(slope / self.unit)))

    @torch.no_grad()
    def apply(self, bytes_by_machine: dict[str, int]) -> Sent:
        """Takes the step that these bytes describe; a machine that has left is not in it, a new one is.

        Args:
            bytes_by_machine: machine -> byte, of all that took part.

        Returns:
            The step, for the record that a newcomer replays.

        Raises:
            UsageError: nobody took part, or a number that is no byte.
        """
        wrong = {name: byte for name, byte in bytes_by_machine.items() if not -127 <= byte <= 127}
        if wrong or not bytes_by_machine:
            allowed, fix = "be one or more, from -127 to 127", "pass what measure() returned on each machine"
            raise UsageError(word("the bytes", got=wrong or "none", allowed=allowed, where=_WHERE, fix=fix))
        scale = -self.rate * self.unit / len(bytes_by_machine)
        for machine in sorted(bytes_by_machine):  # the order of a sum is part of its bits
            if byte := bytes_by_machine[machine]:
                for one, z in _directions(self._trained, self._seed(machine)):
                    one.add_(z, alpha=scale * byte)
        self._follow(max(abs(byte) for byte in bytes_by_machine.values()))
        self.step += 1
        return Sent(self.step - 1, dict(bytes_by_machine))

    def replay(self, record: Iterable[Sent]) -> None:
        """Takes recorded steps: a newcomer with the first model's numbers gets to where the others are, to the bit.

        Raises:
            UsageError: a step is missing or comes twice.
        """
        for sent in record:
            if sent.step != self.step:
                got, allowed = f"step {sent.step}", f"go on at step {self.step}"
                fix = "replay every step once, from the first, on the numbers that all started from"
                raise UsageError(word("the record", got=got, allowed=allowed, where=_WHERE, fix=fix))
            self.apply(sent.bytes_by_machine)

    def _seed(self, machine: str) -> int:
        text = f"{self.seed}/{self.step}/{machine}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1

    def _follow(self, largest: int) -> None:
        self._quiet = 0 if largest > 32 else self._quiet + 1
        if largest == 127:
            self.unit *= 2
        elif self._quiet == 50:
            self.unit, self._quiet = self.unit / 2, 0


@torch.no_grad()
def perturbed(parameters: Sequence[Tensor], seed: int, eps: float, value: Callable[[], float]) -> tuple[float, float]:
    """``value()`` at parameters + eps z and at parameters - eps z; z is normal, and drawn again, never held whole.

    Args:
        parameters: changed in place meanwhile, and put back to the bit.
        seed: of z.
        eps: the perturbation.
        value: reads the parameters.

    Returns:
        The value above and below.

    >>> x = torch.tensor([2.0])
    >>> high, low = perturbed([x], 0, 1e-3, lambda: float(x.sum()))
    >>> x.item(), round((high + low) / 2, 5)
    (2.0, 2.0)

    Source: Malladi et al., 2023, "Fine-Tuning Language Models with Just Forward Passes" (MeZO). Where we differ: the
    parameters are kept and put back; MeZO adds and subtracts, and drifts by rounding.
    """
    kept = [one.detach().clone() for one in parameters]
    found = []
    try:
        for sign in (eps, -eps):
            for (one, z), was in zip(_directions(parameters, seed), kept, strict=True):
                one.copy_(was).add_(z, alpha=sign)
            found.append(value())
    finally:
        for one, was in zip(parameters, kept, strict=True):
            one.copy_(was)
    return found[0], found[1]


def _directions(parameters: Sequence[Tensor], seed: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Each parameter with its part of z, drawn on the CPU so that every machine draws the same."""
    chance = torch.Generator().manual_seed(seed)
    for one in parameters:
        z = torch.randn(one.shape, generator=chance, dtype=torch.float32)
        yield one, z.to(device=one.device, dtype=one.dtype)


def gather_bytes(group: "dist.ProcessGroup | None" = None) -> Exchange:
    """An exchange over the processes of a group of torch.distributed: one byte of each, under the name of its rank.

    >>> OneByte(nn.Linear(1, 1), machine="0", rate=0.1).machine  # what rank 0 must be called
    '0'

    Raises:
        UsageError: there is no process group; from the exchange, a machine that is not named as its rank.

    Source: Zelikman et al., 2023, "Just One Byte (per gradient)".
    """
    where = "turnout.train.zeroth.gather_bytes"
    if not (dist.is_available() and dist.is_initialized()):
        fix = "start with torchrun and call torch.distributed.init_process_group first"
        raise UsageError(word("the process group", got="none", allowed="be set up", where=where, fix=fix))

    def exchange(machine: str, byte: int) -> dict[str, int]:
        if machine != str(dist.get_rank(group)):
            allowed, fix = "be the rank", f"pass machine={str(dist.get_rank(group))!r}"
            raise UsageError(word("the machine", got=machine, allowed=allowed, where=where, fix=fix))
        parts = [torch.zeros(1, dtype=torch.int8) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, torch.tensor([byte], dtype=torch.int8), group=group)
        return {str(rank): int(part) for rank, part in enumerate(parts)}

    return exchange
