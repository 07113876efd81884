"""Claim: federated scales and shifts chosen for each instance from a pool beat one set shared by all."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.digits import CLASSES, LOOKS, SIDE, digits
from turnout.layers.scaled import Asking
from turnout.paths import SSF
from turnout.reshape.adapters.scale_and_shift import scale_and_shift
from turnout.train.federated.rounds import Client, federate
from turnout.types import Given

_HIDDEN, _CLIENTS, _OWN, _HELD_OUT = 64, 8, 600, 3000
_POOL, _TOP_K, _MATCH, _SPREAD = 12, 2, 0.1, 0.02
_ROUNDS, _PER_ROUND, _STEPS, _BATCH, _RATE = 20, 4, 20, 32, 0.2


def fedins() -> Claim:
    """A pool of twelve scales and shifts, two for each instance, errs less than one set that all instances share.

    The frozen network knows plain digits; clients hold digits in three of six looks each. Both ways take the same
    rounds, clients, steps and head, and start at random, as published; clients weigh alike. The query is what the
    frozen network's last hidden layer sees, standardised by what it saw of plain digits.

    >>> fedins().off
    'one set for all instances'

    Source: Feng et al., 2023, "Towards Instance-adaptive Inference for Federated Learning".
    """
    metric = "share of wrong answers, all looks alike"
    return Claim(
        name="fedins",
        statement="Scales and shifts chosen for each instance from a federated pool beat one federated set, and "
        "federated training of all weights.",
        source="Feng et al., 2023, Towards Instance-adaptive Inference for Federated Learning (FedIns)",
        off="one set for all instances",
        switched={"pool": "one"},
        rows=(
            Row(metric, "below", "pool", "one", "one set for all"),
            Row(metric, "below", "pool", "frozen", "the frozen network"),
            Row(metric, "below", "pool", "fedavg", "FedAvg of all weights", headline=True),
        ),
        measure=_measure,
        seconds=16,
        note=f"drawn digits in {LOOKS} looks; {_CLIENTS} clients of {_OWN} examples, {_PER_ROUND} in each of {_ROUNDS} "
        f"rounds of {_STEPS} steps; one head for all members. In use at the end: {{members, pool:.1f}} of {_POOL} "
        "members; with a query that is not standardised {members, raw query:.1f}, error {raw query:.3f}. FedAvg of all "
        "weights sends {ratio:.1f} times as many numbers",
        limits=(0.0, 1e9),
    )


def _measure(seed: int) -> Values:
    return _World(seed).measure()


class _Query(nn.Module):
    """What a frozen network's last hidden layer sees, before it bends; standardised by what it saw of some images."""

    def __init__(self, net: nn.Module, x_BD: Tensor | None) -> None:
        super().__init__()
        self.net = net
        seen_BH = None if x_BD is None else net(x_BD).detach()
        self.register_buffer("mean", torch.zeros(1) if seen_BH is None else seen_BH.mean(0))
        self.register_buffer("deviation", torch.ones(1) if seen_BH is None else seen_BH.std(0) + 1e-3)

    def forward(self, x_BD: Tensor) -> Tensor:
        return (self.net(x_BD) - self.mean) / self.deviation


class _World:
    """The clients of one seed, and what is trained on them."""

    def __init__(self, seed: int) -> None:
        self.seed, self.chance = seed, torch.Generator().manual_seed(seed)
        self.plain_BD, label_B = self._draw(_HELD_OUT, torch.zeros(1, dtype=torch.long))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            hidden = nn.Linear(SIDE * SIDE, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.ReLU()
            self.net = nn.Sequential(*hidden, nn.Linear(_HIDDEN, CLASSES))
        optimizer = torch.optim.Adam(self.net.parameters(), lr=3e-3)
        self._steps(self.net, (self.plain_BD, label_B), optimizer, 400, 2 * _BATCH, self.chance)
        looks = [torch.tensor([at, at + 1, at + 3]) % LOOKS for at in range(_CLIENTS)]
        self.clients = [Client(str(at), self._draw(_OWN, look), size=_OWN) for at, look in enumerate(looks)]
        self.x_BD, self.label_B = self._draw(_HELD_OUT, torch.arange(LOOKS))

    def _draw(self, count: int, looks: Tensor) -> tuple[Tensor, Tensor]:
        label_B = torch.randint(CLASSES, (count,), generator=self.chance)
        look_B = looks[torch.randint(len(looks), (count,), generator=self.chance)]
        return digits(label_B, look_B, self.chance), label_B

    def _steps(
        self,
        model: nn.Module,
        data: tuple[Tensor, Tensor],
        optimizer: torch.optim.Optimizer,
        steps: int,
        batch: int,
        generator: torch.Generator,
    ) -> None:
        x_BD, label_B = data
        for _ in range(steps):
            pick = torch.randint(len(x_BD), (batch,), generator=generator)
            loss = F.cross_entropy(model(x_BD[pick]), label_B[pick])
            if isinstance(model, Asking):
                loss = (1 - _MATCH) * loss + _MATCH * (1 - model.match(x_BD[pick]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def _federated(self, model: nn.Module) -> int:
        """How many numbers were sent."""

        def local(model: nn.Module, client: Client, *, generator: torch.Generator) -> None:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self._steps(model, client.data, torch.optim.SGD(trained, lr=_RATE), _STEPS, _BATCH, generator)

        done = federate(model, self.clients, local, rounds=_ROUNDS, per_round=_PER_ROUND, seed=self.seed)
        return sum(one.sent for one in done)

    def _pooled(self, pool_size: int, *, raw: bool = False) -> Asking:
        query = _Query(copy.deepcopy(self.net)[:3], None if raw else self.plain_BD)
        sizes = {"query_width": _HIDDEN, "pool_size": pool_size, "top_k": min(_TOP_K, pool_size)}
        generator = torch.Generator().manual_seed(self.seed)
        model, _ = scale_and_shift(
            copy.deepcopy(self.net), ["0", "2"], query=query, trained=["4"], generator=generator, **sizes
        )
        for pool in (module for module in model.modules() if isinstance(module, SSF)):
            nn.init.normal_(pool.scale, 1.0, _SPREAD, generator=generator)
            nn.init.normal_(pool.shift, 0.0, _SPREAD, generator=generator)
        return model

    @torch.no_grad()
    def _error(self, model: nn.Module) -> float:
        return float((model.eval()(self.x_BD).argmax(1) != self.label_B).float().mean())

    @torch.no_grad()
    def _members(self, model: Asking) -> float:
        """How many members at least one in a hundred instances takes."""
        query_BQ = model.ask(self.x_BD)
        given = Given.of(len(query_BQ), len(query_BQ), query_BQ=query_BQ)
        return float((model.router(query_BQ, given=given).load_E > len(query_BQ) / 100).sum())

    def measure(self) -> Values:
        """Errors, members in use and numbers sent, by name."""
        models = {
            "pool": self._pooled(_POOL),
            "one": self._pooled(1),
            "raw query": self._pooled(_POOL, raw=True),
            "fedavg": copy.deepcopy(self.net),
        }
        sent = {f"sent by {name}": float(self._federated(model)) for name, model in models.items()}
        found = {name: self._error(model) for name, model in models.items()} | {"frozen": self._error(self.net)}
        for name in ("pool", "raw query"):
            asking = models[name]
            assert isinstance(asking, Asking)
            found[f"members, {name}"] = self._members(asking)
        return found | sent | {"ratio": sent["sent by fedavg"] / sent["sent by pool"]}
