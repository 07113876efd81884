"""Experts on other processes: values, gradients and refusals, with uneven loads, no rows, no tokens, and copies."""

import pytest
import torch
from processes import spawn
from torch import Tensor

from turnout.errors import ShapeError, UsageError
from turnout.paths import Bank
from turnout.run import execute
from turnout.run.ranks.expert_parallel import Owners, expert_parallel
from turnout.run.ranks.processes import Ranks
from turnout.types import ExpertWeights, Routing

E, D, F, K = 6, 8, 6, 2
# Tokens of each process, and the experts that they choose among: one has none, one sends all to the first two.
CASES = {
    "even": ([5, 5, 5], range(E)),
    "uneven": ([7, 0, 3], range(E)),
    "one-sided": ([4, 6, 2], range(2)),
    "nothing": ([0, 0, 0], range(E)),
}
SLOTS = {
    "in order": [0, 1, 2, 3, 4, 5],
    "mixed": [5, 0, 2, 4, 1, 3],
    "copies": [0, 1, 2, 0, 3, 4, 0, 5, 2],
}


def _weights(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    bank = Bank(E, D, F, bias=True, std=0.5, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        bank.up_bias.normal_(generator=torch.Generator().manual_seed(2))
        bank.down_bias.normal_(generator=torch.Generator().manual_seed(3))
    return [t.detach() for t in (bank.up_EDH, bank.down_EFD, bank.up_bias, bank.down_bias)]


def _tokens(counts: list[int], among: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chance = torch.Generator().manual_seed(4)
    T = sum(counts)
    x_TD = torch.randn(T, D, generator=chance, dtype=torch.float64)
    index_TK = torch.rand(T, len(among), generator=chance).argsort(1)[:, :K]
    weight_TK = torch.rand(T, K, generator=chance, dtype=torch.float64)
    return x_TD, index_TK, weight_TK, torch.randn(T, D, generator=chance, dtype=torch.float64)


def _run(
    x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, slope_TD: Tensor, tensors: list[Tensor], run
) -> list[Tensor]:
    """The output, and the gradients of tokens, weights and experts."""
    leaves = [each.clone().requires_grad_() for each in (x_TD, weight_TK, *tensors)]
    routing = Routing.from_topk(index_TK, leaves[1], num_experts=E)
    y_TD = run(leaves[0], routing, ExpertWeights(*leaves[2:]))
    (y_TD * slope_TD).sum().backward()
    return [y_TD.detach(), *(leaf.grad for leaf in leaves)]


def both(ranks: Ranks) -> list[str]:
    """What is wrong, over all cases."""
    wrong = []
    for case, (counts, among) in CASES.items():
        whole = _tokens(counts, among)
        want = _run(*whole, _weights(), execute)
        own = [each.split(counts)[ranks.rank] for each in whole]
        for kind, slots in SLOTS.items():
            owners = Owners(torch.tensor(slots), E, torch.distributed.group.WORLD)
            mine = [tensor[owners.own] for tensor in _weights()]
            got = _run(*own, mine, lambda x, routing, w, owners=owners: expert_parallel(x, routing, w, owners))
            own_want = [each.split(counts)[ranks.rank] for each in want[:3]]
            for part, (a, b) in enumerate(zip(got, [*own_want, *(g[owners.own] for g in want[3:])], strict=True)):
                if a.shape != b.shape or (a.numel() and float((a - b).abs().max()) > 1e-12):
                    wrong.append(f"{case}, {kind}, part {part}: {float((a - b).abs().max()) if a.numel() else a.shape}")
    return wrong


@pytest.mark.slow
def test_values_and_gradients_are_those_of_one_process() -> None:
    """Of the tokens, of the routing's weights, and of the experts, copies each with the sum of all."""
    found = spawn(3, both)
    assert found == [[], [], []], found


class _Group:
    """As many processes as one likes, of which only the number is asked."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


def test_slots_are_checked() -> None:
    """By name, before anything is sent."""
    with pytest.raises(UsageError, match="multiple of the 4 processes") as error:
        Owners.even(6, _Group(4))
    assert "share them among 3 processes" in str(error.value)
    with pytest.raises(UsageError, match="once on each process"):
        Owners(torch.tensor([0, 0, 1, 2]), 3, _Group(2))
    with pytest.raises(UsageError, match="see to expert 2"):
        Owners(torch.tensor([0, 1, 1, 3]), 4, _Group(2))


def test_other_experts_are_refused() -> None:
    """The weights of all experts where those of this process are wanted, and a routing among too few."""
    owners, weights = Owners.even(E, _Group(2)), ExpertWeights(*_weights())
    routing = Routing.from_topk(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), num_experts=E)
    with pytest.raises(ShapeError, match="be the 3 that this process holds"):
        expert_parallel(torch.zeros(1, D), routing, weights, owners)
    fewer = Routing.from_topk(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), num_experts=3)
    own = ExpertWeights(*(tensor[:3] for tensor in _weights()))
    with pytest.raises(ShapeError, match="1 tokens x 6 experts"):
        expert_parallel(torch.zeros(1, D), fewer, own, owners)


def test_copies_take_turns() -> None:
    """Each copy of an expert gets its part of a process's rows, one more or less."""
    owners = Owners(torch.tensor([0, 1, 0, 2]), 3, _Group(2))
    routing = Routing.from_topk(torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1), num_experts=3)
    assert owners.slot_of(routing).tolist() == [0, 2, 0, 2, 0]
