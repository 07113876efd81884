"""Claim: a byte a step and machine is enough to learn from everybody's data, with replicas alike to the bit."""

import array
import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.digits import CLASSES, SIDE, digits
from turnout.train.zeroth import OneByte, Sent, mezo

_MACHINES, _STEPS, _BATCH, _RATE, _EPS = "abcd", 1000, 64, 5e-3, 1e-2
_START_STEPS, _SHARD, _HELD_OUT, _WIDTH = 150, 1000, 3000, 24
_PLAIN, _FAINT = 0, 2  # looks: the one the start knows, and the one it is tuned to
_COUNT = SIDE * SIDE * _WIDTH + _WIDTH + _WIDTH * CLASSES + CLASSES


def one_byte() -> Claim:
    """Machines with unlike data tune one network by a byte a step; alone, one machine forgets the others'.

    The off arm is a machine by itself: the same steps and data, no bytes of others.

    >>> one_byte().off
    'one machine by itself: nobody else is heard'

    Source: Zelikman et al., 2023, "Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model
    Finetuning Using Shared Randomness".
    """
    loss, why = "held-out nats", "what a reader of the curve would not see"
    return Claim(
        name="one_byte",
        statement="Machines that share a seed and send one byte a step learn from all of their data, and their models "
        "stay alike to the bit, also when some leave and others come.",
        source="Zelikman et al., 2023, Just One Byte (per gradient)",
        off="one machine by itself: nobody else is heard",
        switched={"bytes": "alone", "apart": "apart alone"},
        rows=(
            Row(loss, "below", "bytes", "alone", "one machine by itself"),
            Row("share of entries in which replicas differ", "within", "apart", "apart alone",
                "machines by themselves", bound=0.0),
            Row(loss, "no_worse", "bytes", "whole", "one machine with all data, slopes in full", margin=0.02, why=why,
                headline=True),
            Row("bytes a step over those of a dense gradient in 32 bits", "within", "sent", "dense", "data parallelism",
                bound=1e-4, headline=True),
        ),
        measure=_measure,
        seconds=12,
        note=f"{len(_MACHINES)} machines, {_STEPS} steps of {_BATCH} each, from a network of {_COUNT} numbers that "
        "knows plain digits, to faint ones; before {before:.3f}. Half-way one machine leaves, and another with its "
        "data comes, which replays the record",
    )  # fmt: skip


def _measure(seed: int) -> Values:
    world = _World(seed)
    together, sent = world.together()
    alone = [world.alone(name) for name in _MACHINES[:2]]
    whole = copy.deepcopy(world.start)
    mezo(whole, world.all_data, steps=_STEPS, rate=_RATE, eps=_EPS, seed=seed)
    return {
        "before": world.loss(world.start),
        "bytes": world.loss(together[0]),
        "alone": world.loss(alone[0]),
        "whole": world.loss(whole),
        "apart": max(_apart(together[0], one) for one in together[1:]),
        "apart alone": _apart(*alone),
        "sent": sent / (4 * _COUNT),
        "dense": 1.0,
    }


class _World:
    """One seed's start, data of each machine, and data to measure on."""

    def __init__(self, seed: int) -> None:
        self.seed, self.chance = seed, torch.Generator().manual_seed(seed)
        self.start = self._start()
        self.data = {name: self._drawn(_SHARD, at) for at, name in enumerate(_MACHINES)}
        self.held_out = self._drawn(_HELD_OUT)

    def _drawn(self, count: int, machine: int | None = None, look: int = _FAINT) -> tuple[Tensor, Tensor]:
        label_B = torch.randint(CLASSES, (count,), generator=self.chance)
        if machine is not None:  # half of a machine's data are of three classes
            few_B = (torch.randint(3, (count,), generator=self.chance) + machine * 5 // 2) % CLASSES
            label_B = torch.where(torch.rand(count, generator=self.chance) < 0.5, few_B, label_B)
        return digits(label_B, torch.full((count,), look), self.chance), label_B

    def _start(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = nn.Sequential(nn.Linear(SIDE * SIDE, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, CLASSES))
        x, label = self._drawn(4000, look=_PLAIN)
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(_START_STEPS):
            pick_B = torch.randint(len(x), (128,), generator=self.chance)
            optimizer.zero_grad()
            F.cross_entropy(net(x[pick_B]), label[pick_B]).backward()
            optimizer.step()
        return net

    def _machine(self, name: str) -> OneByte:
        return OneByte(copy.deepcopy(self.start), name, rate=_RATE, eps=_EPS, seed=self.seed)

    def batch(self, name: str, step: int) -> tuple[Tensor, Tensor]:
        x, label = self.data[name[0]]
        chance = torch.Generator().manual_seed(10_000 * self.seed + 10 * step + ord(name[0]) % 10)
        pick_B = torch.randint(len(x), (_BATCH,), generator=chance)
        return x[pick_B], label[pick_B]

    def together(self) -> tuple[list[nn.Module], float]:
        """The models of all machines that are there at the end, and the bytes that each has sent a step."""
        there, record = {name: self._machine(name) for name in _MACHINES}, list[Sent]()
        for step in range(_STEPS):
            if step == _STEPS // 2:  # the last leaves; who comes has its data, and another name
                del there[_MACHINES[-1]]
                new = self._machine(_MACHINES[-1] * 2)
                new.replay(record)
                there[new.machine] = new
            sent = {name: one.measure(_loss_on(self.batch(name, step))) for name, one in there.items()}
            record.append([one.apply(sent) for one in there.values()].pop())
        # What is no whole number of one signed byte does not go into this array.
        travelled = [len(array.array("b", one.bytes_by_machine.values()).tobytes()) for one in record]
        machines = [len(one.bytes_by_machine) for one in record]
        return [one.model for one in there.values()], sum(travelled) / sum(machines)

    def alone(self, name: str) -> nn.Module:
        """The model of a machine that hears nobody."""
        one = self._machine(name)
        for step in range(_STEPS):
            one.apply({name: one.measure(_loss_on(self.batch(name, step)))})
        return one.model

    def all_data(self, model: nn.Module, step: int) -> Tensor:
        x, label = map(torch.cat, zip(*(self.batch(name, step) for name in _MACHINES), strict=True))
        return F.cross_entropy(model(x), label)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        return float(F.cross_entropy(model(self.held_out[0]), self.held_out[1]))


def _loss_on(batch: tuple[Tensor, Tensor]) -> Callable[[nn.Module], Tensor]:
    return lambda model: F.cross_entropy(model(batch[0]), batch[1])


def _apart(one: nn.Module, other: nn.Module) -> float:
    differ = [(a != b).sum() for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    return float(torch.stack(differ).sum()) / _COUNT
