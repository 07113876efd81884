"""Federated training, simulated in one process: clients train copies on their own data, a server averages them."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from turnout.errors import TrainingError, UsageError, word
from turnout.expects import CALLED, expects, several

__all__ = ["Client", "Round", "aggregate", "federate"]

_WHERE = "turnout.train.federate"


@dataclasses.dataclass(frozen=True, eq=False)
class Client:
    """One holder of data that never leaves it.

    Args:
        name: for messages and records.
        data: whatever the local training takes.
        size: its weight in the average, above 0: how many examples it holds.

    >>> Client("hospital", data=None, size=120).size
    120

    Source: McMahan et al., 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data".
    """

    name: str
    data: Any
    size: float = 1.0


@dataclasses.dataclass(frozen=True)
class Round:
    """What one round was.

    Args:
        clients: the names of those that took part.
        sent: how many numbers the server sent to all of them; as many came back.

    >>> Round(("hospital",), 10).sent
    10

    Source: none; plain bookkeeping.
    """

    clients: tuple[str, ...]
    sent: int


class Local(Protocol):
    """What a client does with its copy: it trains it in place; ``generator`` is the client's own chance."""

    def __call__(self, model: nn.Module, client: Client, *, generator: torch.Generator) -> None:
        """Trains; only what travels asks for gradients."""


@expects(states=several(Mapping))
def aggregate(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Name -> the weighted mean over those states that have it, worked out in float64 and rounded once.

    theta = sum_c w_c theta_c / sum_c w_c, the sums over the states with that name.

    Args:
        states: of floating-point tensors; names may differ, shapes under one name may not.
        weights: one positive number a state.

    Raises:
        UsageError: another number of weights than states, or one that is not positive.

    >>> a, b = {"x": torch.tensor(1.0), "y": torch.tensor(5.0)}, {"x": torch.tensor(4.0)}
    >>> {name: mean.item() for name, mean in aggregate([a, b], [2, 1]).items()}
    {'x': 2.0, 'y': 5.0}

    Source: McMahan et al., 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data" (FedAvg).
    """
    if len(states) != len(weights) or not all(0 < weight < float("inf") for weight in weights):
        got, allowed = f"{len(states)} states, weights {list(weights)}", "have one positive weight a state"
        where, fix = "turnout.train.aggregate", "pass the clients' sizes"
        raise UsageError(word("states", got=got, allowed=allowed, where=where, fix=fix))
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for state in states for name in state):
        here = [(state[name], weight) for state, weight in zip(states, weights, strict=True) if name in state]
        total = sum(weight for _, weight in here)
        mean = torch.stack([tensor.double() * (weight / total) for tensor, weight in here]).sum(0)
        found[name] = mean.to(here[0][0].dtype)
    return found


@expects(model=nn.Module, clients=several(Client), local=CALLED)
def federate(
    model: nn.Module,
    clients: Sequence[Client],
    local: Local,
    *,
    rounds: int,
    per_round: int | None = None,
    choose: Callable[[int, torch.Generator], Sequence[int]] | None = None,
    travels: Callable[[nn.Module, Client], Iterable[str]] | None = None,
    seed: int = 0,
) -> tuple[Round, ...]:
    """The rounds: some clients train copies of what they are sent, and the server takes the mean of what comes back.

    The model is changed in place. A client starts from the server's numbers, buffers included; each parameter becomes
    the mean over those clients of the round that were sent it, weighted by size. Nothing else comes back.

    Args:
        model: the server's.
        clients: all there are.
        local: what each does with its copy.
        rounds: how many.
        per_round: how many clients take part, drawn without replacement; None is all.
        choose: from the round's number to the positions of its clients, in place of ``per_round``.
        travels: from the server's model and a client to the names, in ``state_dict``, that it is sent to train. None
            is every parameter that asks for a gradient, and every floating-point buffer.
        seed: of the choice and of the clients' chance.

    Raises:
        UsageError: a ``per_round`` that is not between 1 and the number of clients.
        TrainingError: a client sent a number that is not finite; the model is as before the round.

    >>> def step(model, client, *, generator):
    ...     model.weight.data.fill_(client.data)
    >>> server = nn.Linear(1, 1, bias=False)
    >>> federate(server, [Client("a", 1.0, size=3), Client("b", 5.0)], step, rounds=1)
    (Round(clients=('a', 'b'), sent=2),)
    >>> server.weight.item()
    2.0

    Source: McMahan et al., 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data" (FedAvg).
    """
    count = len(clients) if per_round is None else per_round
    if not 1 <= count <= len(clients):
        got, allowed = f"{count} of {len(clients)}", "be from 1 to the number of clients"
        raise UsageError(word("per_round", got=got, allowed=allowed, where=_WHERE, fix="leave per_round=None"))
    generator = torch.Generator().manual_seed(seed)
    worker, done = copy.deepcopy(model), []
    for number in range(rounds):
        drawn = torch.randperm(len(clients), generator=generator)[:count].sort()[0].tolist()
        here = [clients[at] for at in (drawn if choose is None else choose(number, generator))]
        names = [list(_all(model) if travels is None else travels(model, client)) for client in here]
        pairs = zip(here, names, strict=True)
        states = [_visit(model, worker, client, own, local, _chance(generator)) for client, own in pairs]
        server = model.state_dict()
        for name, mean in aggregate(states, [client.size for client in here]).items():
            server[name].copy_(mean)
        sent = sum(one.numel() for state in states for one in state.values())
        done.append(Round(tuple(client.name for client in here), sent))
    return tuple(done)


def _chance(generator: torch.Generator) -> torch.Generator:
    return torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))


def _visit(
    model: nn.Module, worker: nn.Module, client: Client, names: list[str], local: Local, generator: torch.Generator
) -> dict[str, Tensor]:
    """What one client sends back."""
    worker.load_state_dict(model.state_dict())
    asking = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in worker.named_parameters():
        parameter.requires_grad_(name in asking and name in names)
        parameter.grad = None
    local(worker, client, generator=generator)
    state = worker.state_dict()
    for name in names:
        if not bool(state[name].isfinite().all()):
            got, fix = f"{name} of client {client.name!r}", "train it with a lower rate"
            raise TrainingError(word("what came back", got=got, allowed="be finite", where=_WHERE, fix=fix))
    return {name: state[name].detach().clone() for name in names}


def _all(model: nn.Module) -> Iterable[str]:
    kept = model.state_dict()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return trained + [name for name, one in model.named_buffers() if name in kept and one.is_floating_point()]
