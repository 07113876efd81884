"""Claim: federated experts, chosen for a new client by a gate that saw none of its labels, beat one global model."""

import copy
import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.digits import CLASSES, SIDE, digits
from turnout.decide.token import FedJETs
from turnout.models.jets import Jets
from turnout.train.federated.fedjets import fedjets as train
from turnout.train.federated.rounds import Client, federate

_GROUPS, _CLIENTS, _NEW = 5, 25, 10
_PUBLIC, _OWN, _HELD_OUT = 800, 60, 200
_ROUNDS, _STEPS, _BATCH, _RATE, _HIDDEN, _ANCHOR = 20, 5, 32, 0.1, 32, 4.0


def fedjets() -> Claim:
    """New clients with two kinds of digits each: the expert that the gate finds for them errs less than one by chance.

    All start from the common expert, trained on 800 public examples of all ten digits: FedAvg's model and the five
    experts. Ten clients take part in a round of either; for FedJETs five of them are the anchors. Every client's data
    are two digits, one of five such pairs. FedAvg is also given what the gate is, a client's unlabelled examples: its
    answers are then weighted by their mean over them.

    >>> fedjets().off
    'an expert by chance'

    Source: Dun et al., 2023, "FedJETs: Efficient Just-In-Time Personalization with Federated Mixture of Experts".
    """
    metric, told = "share of wrong answers at clients never seen", "FedAvg, its answers weighted by their mean"
    common = "the common expert that all start from"
    return Claim(
        name="fedjets",
        statement="The expert that the gate finds for an unlabelled new client beats one by chance, and one model "
        "averaged over all.",
        source="Dun et al., 2023, FedJETs",
        off="an expert by chance",
        switched={"gate": "chance"},
        rows=(
            Row(metric, "below", "gate", "chance", "an expert by chance"),
            Row(metric, "below", "gate", "common", common),
            Row(metric, "below", "gate", "fedavg", "FedAvg, from the same start", headline=True),
            Row(metric, "below", "gate", "fedavg, weighted", told, headline=True),
        ),
        measure=_measure,
        seconds=3,
        note=f"drawn digits; {_CLIENTS} clients of {_OWN} examples, {_ROUNDS} rounds of {_STEPS} steps. The anchors' "
        f"loss weighs {_ANCHOR:g}: with 1, on design seeds, the gate sends some pairs to another's expert. What helps "
        "is to know the client: for each example alone the gate errs in {gate, alone:.3f}, for each among the client's "
        "two best experts in {gate, two experts:.3f}",
    )


def _measure(seed: int) -> Values:
    return _World(seed).errors()


class _Features(nn.Module):
    """The answers of the common expert, before the softmax."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class _World:
    """The clients of one seed, and what is trained on them."""

    def __init__(self, seed: int) -> None:
        self.seed, self.chance = seed, torch.Generator().manual_seed(seed)
        self.pair = torch.randperm(CLASSES, generator=self.chance).view(_GROUPS, 2)
        self.common = self._common()
        self.clients = [self._client(at, _OWN) for at in range(_CLIENTS)]
        self.new = [self._client(at, _HELD_OUT) for at in range(_NEW)]

    def _draw(self, label_B: Tensor) -> Tensor:
        return digits(label_B, torch.zeros_like(label_B), self.chance)

    def _client(self, at: int, size: int) -> Client:
        label_B = self.pair[at % _GROUPS][torch.randint(2, (size,), generator=self.chance)]
        return Client(str(at), (self._draw(label_B), label_B), size=size)

    def _common(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            net = nn.Sequential(nn.Linear(SIDE * SIDE, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, CLASSES))
        label_B = torch.arange(CLASSES).repeat(_PUBLIC // CLASSES)
        x_BD = self._draw(label_B)
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(150):
            loss = F.cross_entropy(net(x_BD), label_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return net

    def errors(self) -> dict[str, float]:
        """Way to answer -> the share of wrong answers at the new clients."""
        experts = [copy.deepcopy(self.common) for _ in range(_GROUPS)]
        gate = FedJETs(CLASSES, _GROUPS, generator=self.chance)
        jets = Jets(_Features(copy.deepcopy(self.common)), experts, gate)
        anchors = {at: at for at in range(_GROUPS)}  # client i holds pair i
        options = {"steps": _STEPS, "batch": _BATCH, "rate": _RATE, "anchor_weight": _ANCHOR, "seed": self.seed}
        train(jets, self.clients, rounds=_ROUNDS, per_round=_GROUPS, keep=2, anchors=anchors, **options)
        jets.eval()
        one = copy.deepcopy(self.common)
        federate(one, self.clients, _local, rounds=_ROUNDS, per_round=2 * _GROUPS, seed=self.seed)
        any_one = [torch.randint(_GROUPS, (1,), generator=self.chance) for _ in self.new]
        found: dict[str, list[float]] = {}
        for client, other in zip(self.new, any_one, strict=True):
            x_BD, label_B = client.data
            with torch.no_grad():
                answer = {
                    "gate": jets(x_BD, among=jets.assign(x_BD, 1)),
                    "gate, two experts": jets(x_BD, among=jets.assign(x_BD, 2)),
                    "gate, alone": jets(x_BD),
                    "chance": jets(x_BD, among=other),
                    "fedavg": one(x_BD),
                    "fedavg, weighted": one(x_BD).softmax(1) * one(x_BD).softmax(1).mean(0),
                    "common": self.common(x_BD),
                }
            for name, y_BC in answer.items():
                found.setdefault(name, []).append(float((y_BC.argmax(1) != label_B).float().mean()))
        return {name: statistics.fmean(values) for name, values in found.items()}


def _local(model: nn.Module, client: Client, *, generator: torch.Generator) -> None:
    """The same steps as a client of FedJETs takes."""
    x_BD, label_B = client.data
    optimizer = torch.optim.SGD(model.parameters(), lr=_RATE)
    for _ in range(_STEPS):
        pick = torch.randint(len(x_BD), (_BATCH,), generator=generator)
        loss = F.cross_entropy(model(x_BD[pick]), label_B[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
