"""Several banks side by side, each with experts of its own kind; and what every expert makes of every token."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.types import Cost, Routing
from turnout.types.called import Called

__all__ = ["Mixed", "every"]


class Mixed(Called):
    """Banks one after the other: the first has the experts from 0, the next those after them, and so on.

    y = sum over the banks of bank(x, the columns of the routing that are its own). Each sees the entries of its experts
    alone, so a bank whose experts compute nothing costs what its entries are, and no more.

    Args:
        banks: called as ``bank(x_TD, routing, backend=...)``, with ``num_experts`` and ``cost(tokens, entries)``.

    Raises:
        UsageError: no bank.

    >>> from turnout.paths import Bank
    >>> mixed = Mixed([Bank(2, width=8, hidden=4), Bank(1, width=8, hidden=16)])
    >>> routing = Routing.from_topk(torch.tensor([[0], [2]]), torch.ones(2, 1), num_experts=3)
    >>> mixed.num_experts, mixed(torch.zeros(2, 8), routing).shape
    (3, torch.Size([2, 8]))

    Source: Jin et al., 2024, "MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts", whose
    experts are of different kinds under one router.
    """

    def __init__(self, banks: Sequence[nn.Module]) -> None:
        super().__init__()
        if not banks:
            raise UsageError(
                word(
                    "banks", got="none", allowed="be at least one", where="turnout.paths.Mixed", fix="pass [Bank(...)]"
                )
            )
        self.banks = nn.ModuleList(banks)
        ends = itertools.accumulate((int(bank.num_experts) for bank in banks), initial=0)  # pyrefly: ignore[bad-argument-type]
        self.ranges = tuple(itertools.pairwise(ends))

    @property
    def num_experts(self) -> int:
        """E, of all banks together."""
        return self.ranges[-1][1]

    def forward(self, x_TD: Tensor, routing: Routing, *, backend: str = "auto") -> Tensor:
        """(T, D), each token's weighted sum of its experts' outputs; arguments as of ``Bank``."""
        parts = [
            bank(x_TD, routing.columns(*span), backend=backend)
            for bank, span in zip(self.banks, self.ranges, strict=True)
        ]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def cost(self, tokens: int, entries: float) -> Cost:
        """What a forward pass takes in which every expert gets as many of the entries as any other."""
        shares = [(end - start) / self.num_experts for start, end in self.ranges]
        found = [bank.cost(tokens, entries * share) for bank, share in zip(self.banks, shares, strict=True)]  # pyrefly: ignore[not-callable]
        return Cost(
            params=sum(one.params or 0 for one in found),
            params_active=sum(one.params_active or 0 for one in found),
            flops=sum(one.flops or 0.0 for one in found),
        )


def every(bank: nn.Module, x_TD: Tensor, *, backend: str = "auto") -> Tensor:
    """(T, E, D) what every expert of a bank makes of every token.

    Args:
        bank: as of ``Mixed``.
        x_TD: (T, D) tokens.
        backend: the name of an executor in ``turnout.run``, or "auto".

    >>> from turnout.paths import Bank
    >>> every(Bank(3, width=8, hidden=4), torch.zeros(2, 8)).shape
    torch.Size([2, 3, 8])

    Source: none; each expert alone, E passes of the bank.
    """
    count, ones_T1 = int(bank.num_experts), x_TD.new_ones(len(x_TD), 1)  # pyrefly: ignore[bad-argument-type]
    indices = (torch.full((len(x_TD), 1), expert, device=x_TD.device) for expert in range(count))
    routings = (Routing.from_topk(index_T1, ones_T1, num_experts=count) for index_T1 in indices)
    return torch.stack([bank(x_TD, routing, backend=backend) for routing in routings], 1)
