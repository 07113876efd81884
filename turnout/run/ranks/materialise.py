"""Copies of a few experts for as long as one step lasts: parameters go to them, and gradients come home."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word
from turnout.run.choose import execute
from turnout.run.ranks.exchange import exchange
from turnout.run.ranks.expert_parallel import Owners, spread_rows
from turnout.types import ExpertWeights, Routing

__all__ = ["Materialise"]

_WHERE = "turnout.run.Materialise"


class Materialise:
    """Experts that each live on one process, and have copies on others for a step.

    A sparse all-gather sends an expert to those processes alone that get a copy of it, and its way back, a sparse
    reduce-scatter, adds their gradients to the home's: so parameters, gradients and optimizer state are at home only,
    and copies may be chosen anew in every step.

    Args:
        home: where each expert lives, in one slot.
        owners: every expert at its home, and in as many more slots as a step wants copies.

    Raises:
        UsageError: a home with copies, or owners that leave an expert out of its home.

    Source: Qing et al., 2025, "Hecate: Unlocking Efficient Sparse Model Training via Fully Sharded Sparse Data
    Parallelism" (FSSDP); re-materialisation, which gathers again for the backward pass, is left out.
    """

    def __init__(self, home: Owners, owners: Owners) -> None:
        self.home, self.owners = home, owners
        ranks, rank = home.group.size(), home.rank
        if home.copied:
            fix, got = "give each expert one slot", f"expert {home.copied[0]} in several slots"
            raise UsageError(word("the home", got=got, allowed="be one an expert", where=_WHERE, fix=fix))
        lives, held = home.expert_S.view(ranks, -1).tolist(), owners.expert_S.view(ranks, -1).tolist()
        away = [(expert, at) for at in range(ranks) for expert in lives[at] if expert not in held[at]]
        if away:
            expert, at = away[0]
            fix = "keep every expert where it lives, and add copies"
            got = f"expert {expert} not on process {at}"
            raise UsageError(word("the owners", got=got, allowed="hold it at its home", where=_WHERE, fix=fix))
        # What this process sends to each other one, by its own slots; and which expert came in which order.
        sent = [[lives[rank].index(e) for e in held[to] if e in lives[rank] and to != rank] for to in range(ranks)]
        came = [[e for e in held[rank] if e in lives[source] and source != rank] for source in range(ranks)]
        order = {expert: place for place, expert in enumerate([*lives[rank], *(e for each in came for e in each)])}
        self._slots = [slot for each in sent for slot in each]
        self._sent, self._received = list(map(len, sent)), list(map(len, came))
        self._order = [order[expert] for expert in held[rank]]

    @property
    def sent(self) -> int:
        """Experts that this process sends; over all processes, the number of copies beside the homes."""
        return len(self._slots)

    def gather(self, own: ExpertWeights) -> ExpertWeights:
        """The weights of this process's slots, homes and copies; gradients of copies are added up at their homes.

        Args:
            own: of the experts that live here, in the order of their slots.

        Raises:
            ShapeError: other experts.
        """
        if own.num_experts != self.home.slots:
            fix, allowed = f"pass the weights of experts {self.home.own}", f"be of the {self.home.slots} that live here"
            got = f"{own.num_experts} experts"
            raise ShapeError(word("weights", got=got, allowed=allowed, where=_WHERE, fix=fix))
        stacks = {f.name: getattr(own, f.name) for f in dataclasses.fields(own)}
        stacks = {name: one for name, one in stacks.items() if isinstance(one, Tensor)}
        device = own.up_EDH.device
        slot_N = torch.tensor(self._slots, dtype=torch.int64, device=device)
        order_S = torch.tensor(self._order, dtype=torch.int64, device=device)
        rows = torch.cat([one.index_select(0, slot_N).flatten(1) for one in stacks.values()], 1)
        came = exchange(rows, self._sent, self._received, self.home.group)
        parts = came.split([one[0].numel() for one in stacks.values()], 1)
        found: dict[str, Any] = {
            name: torch.cat([one, part.unflatten(1, one.shape[1:])]).index_select(0, order_S)
            for (name, one), part in zip(stacks.items(), parts, strict=True)
        }
        return dataclasses.replace(own, **found)

    def run(self, x_TD: Tensor, routing: Routing, own: ExpertWeights, *, backend: str = "auto") -> Tensor:
        """Each token's weighted sum of its experts' outputs, rows shared out among the copies.

        Args:
            x_TD: (T, D), this process's tokens.
            routing: which of all E experts each takes, and with what weight.
            own: of the experts that live here.
            backend: an executor of ``turnout.run``.
        """
        weights = self.gather(own)

        def there(row_ND: Tensor, mine: Routing) -> Tensor:
            return execute(row_ND, mine, weights, backend=backend)

        return spread_rows(x_TD, routing, self.owners, there)
