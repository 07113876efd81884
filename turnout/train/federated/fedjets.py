"""FedJETs: clients train the few experts that the gate sends them, and the gate itself; the server averages each."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.expects import expects, several
from turnout.models.jets import Jets
from turnout.train.federated.rounds import Client, Round, federate

__all__ = ["fedjets"]

_WHERE = "turnout.train.fedjets"


@expects(jets=Jets, clients=several(Client))
def fedjets(
    jets: Jets,
    clients: Sequence[Client],
    *,
    rounds: int,
    per_round: int,
    keep: int = 2,
    anchors: Mapping[int, int] | None = None,
    anchor_rounds: int | None = None,
    anchor_weight: float = 1.0,
    steps: int = 10,
    batch: int = 32,
    rate: float = 0.05,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    seed: int = 0,
) -> tuple[Round, ...]:
    """The rounds of ``federate``; each client is sent ``keep`` experts and the gate, and trains them on its own data.

    The experts sent are the largest in the gate's mean over the client's examples. Anchor clients hold data unlike one
    another's; each has one expert, which it is sent always, and its loss adds anchor_weight times the cross-entropy of
    the gate and that expert: that is how the experts, alike at first, part. SGD, from the server's numbers each time.

    Args:
        jets: the server's model, changed in place; its common network is neither sent nor trained.
        clients: with ``data`` a pair: inputs (n, ...) and labels (n,).
        rounds: how many.
        per_round: how many clients besides the anchors take part.
        keep: K, the experts a client gets.
        anchors: position of a client -> its expert.
        anchor_rounds: in how many of the first rounds the anchors take part; None is all.
        anchor_weight: of the gate's own loss.
        steps: of SGD, a client and round, of ``batch`` examples at the ``rate``.
        batch: see steps.
        rate: see steps.
        loss: from outputs (B, O) and labels (B,) to a scalar.
        seed: of all chance.

    Raises:
        UsageError: an anchor that is no client, an expert there is not, or numbers that leave no one to choose.

    >>> from turnout.decide.token import FedJETs
    >>> jets = Jets(nn.Identity(), [nn.Linear(4, 2), nn.Linear(4, 2)], FedJETs(4, 2))
    >>> data = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    >>> [one.sent for one in fedjets(jets, [Client("a", data), Client("b", data)], rounds=2, per_round=1, keep=1)]
    [20, 20]

    Source: Dun et al., 2023, "FedJETs: Efficient Just-In-Time Personalization with Federated Mixture of Experts", from
    the text: there is no published code. Anchors come on top of the drawn clients; within a client the K experts'
    outputs are weighted by the gate.
    """
    until = rounds if anchor_rounds is None else anchor_rounds
    plan = _Plan(clients, dict(anchors or {}), per_round, keep, until)
    plan.check(len(jets.experts), rounds)

    local = _Local(plan, steps, batch, rate, anchor_weight, loss)
    return federate(jets, clients, local, rounds=rounds, choose=plan.choose, travels=plan.travels, seed=seed)


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """Who takes part, and what each is sent."""

    clients: Sequence[Client]
    anchors: dict[int, int]
    per_round: int
    keep: int
    until: int

    def check(self, experts: int, rounds: int) -> None:
        wrong = not all(0 <= at < len(self.clients) and 0 <= one < experts for at, one in self.anchors.items())
        free = len(self.clients) - len(self.anchors)
        alone = not self.per_round and (self.until < rounds or not self.anchors)
        if wrong or alone or not 0 <= self.per_round <= free:
            got = f"anchors {self.anchors} in {self.until} of {rounds} rounds, {self.per_round} of {free} other clients"
            allowed = f"be clients 0 to {len(self.clients) - 1} and experts 0 to {experts - 1}, and someone each round"
            raise UsageError(word("anchors", got=got, allowed=allowed, where=_WHERE, fix="leave anchors=None"))

    def choose(self, number: int, generator: torch.Generator) -> list[int]:
        others = [at for at in range(len(self.clients)) if at not in self.anchors]
        drawn = torch.randperm(len(others), generator=generator)[: self.per_round].tolist()
        return sorted([others[n] for n in drawn] + (list(self.anchors) if number < self.until else []))

    def own(self, client: Client) -> int | None:
        """The expert of an anchor."""
        return next((expert for at, expert in self.anchors.items() if self.clients[at] is client), None)

    def among(self, model: Jets, client: Client) -> Tensor:
        """The experts that a client is sent."""
        own, found = self.own(client), model.assign(client.data[0], self.keep)
        if own is None or own in found.tolist():
            return found
        best = model.assign(client.data[0], self.keep - 1).tolist() if self.keep > 1 else []
        return torch.tensor(sorted([own, *best]), device=found.device)

    def travels(self, model: nn.Module, client: Client) -> list[str]:
        sent = (*(f"experts.{n}." for n in self.among(cast(Jets, model), client).tolist()), "gate.")
        return [name for name, one in model.state_dict().items() if name.startswith(sent) and one.is_floating_point()]


@dataclasses.dataclass(frozen=True, eq=False)
class _Local:
    """What a client does."""

    plan: _Plan
    steps: int
    batch: int
    rate: float
    anchor_weight: float
    loss: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, model: nn.Module, client: Client, *, generator: torch.Generator) -> None:
        jets, (x, label) = cast(Jets, model).train(), client.data
        experts, own = self.plan.among(jets, client), self.plan.own(client)
        optimizer = torch.optim.SGD([one for one in jets.parameters() if one.requires_grad], lr=self.rate)
        for _ in range(self.steps):
            pick = torch.randint(len(x), (min(self.batch, len(x)),), generator=generator).to(x.device)
            value = self.loss(jets(x[pick], among=experts), label[pick])
            if own is not None:
                logit_BE = jets.gate(jets.features(x[pick])).logit_TE
                assert logit_BE is not None, "a FedJETs gate has logits"
                aim_B = torch.full((len(pick),), own, device=x.device)
                value = value + self.anchor_weight * nn.functional.cross_entropy(logit_BE, aim_B)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
