"""Copies for one step: values and gradients of one process, bytes as promised, and a less busy busiest process."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import spawn
from torch import Tensor

from turnout.decide.device.place import hecate
from turnout.errors import ShapeError, UsageError
from turnout.run import execute
from turnout.run.ranks.expert_parallel import Owners
from turnout.run.ranks.materialise import Materialise
from turnout.run.ranks.processes import Ranks
from turnout.types import ExpertWeights, Placement, Routing

E, D, F, T = 8, 6, 5, 400
COUNTS = [120, 0, 200, 80]


def _weights() -> ExpertWeights:
    chance = torch.Generator().manual_seed(2)
    shapes = ((E, D, 2 * F), (E, F, D), (E, 2 * F), (E, D))
    up, down, a, b = (torch.randn(*shape, generator=chance, dtype=torch.float64) for shape in shapes)
    return ExpertWeights(up, down, a, b)


def _slots(load_E: np.ndarray, spare: int) -> list[int]:
    """The planner's copies, filled up so that every process has as many slots."""
    home = Placement.contiguous([E], devices=4)
    placement = hecate(home, [load_E], spare=spare).placement
    found = []
    for device in range(4):
        mine = list(placement.on(0, device))
        mine += [expert for expert in np.argsort(-load_E, kind="stable").tolist() if expert not in mine]
        found += mine[: E // 4 + spare]
    return found


def _step(ranks: Ranks) -> dict[str, object]:
    chance = torch.Generator().manual_seed(1)
    # Few experts take most: of a token's two, one is mostly among the first two.
    score = torch.rand(T, E, generator=chance) + torch.tensor([0.9, 0.6, *[0.0] * (E - 2)])
    index, gate = score.topk(2).indices, torch.rand(T, 2, generator=chance, dtype=torch.float64)
    x, slope = (torch.randn(T, D, generator=chance, dtype=torch.float64) for _ in range(2))

    def leaves(part: slice) -> ExpertWeights:
        w = _weights()
        stacks = (w.up_EDH, w.down_EFD, w.up_bias_EH, w.down_bias_ED)
        return ExpertWeights(*(one[part].clone().requires_grad_() for one in stacks if one is not None))

    def tensors(w: ExpertWeights) -> list[Tensor]:
        return [one for one in (w.up_EDH, w.down_EFD, w.up_bias_EH, w.down_bias_ED) if one is not None]

    judge, whole = leaves(slice(None)), x.clone().requires_grad_()
    routing = Routing.from_topk(index, gate, num_experts=E)
    want = execute(whole, routing, judge)
    (want * slope).sum().backward()
    group = dist.group.WORLD
    home = Owners.even(E, group)
    lives = slice(ranks.rank * 2, ranks.rank * 2 + 2)
    mine = [one.split(COUNTS)[ranks.rank] for one in (x, index, gate, slope, want.detach(), whole.grad)]
    found: dict[str, object] = {}
    for spare in (0, 1, 3):
        step = Materialise(home, Owners(torch.tensor(_slots(routing.load_E.numpy(), spare)), E, group))
        own, here = leaves(lives), mine[0].clone().requires_grad_()
        y = step.run(here, Routing.from_topk(mine[1], mine[2], num_experts=E), own)
        (y * mine[3]).sum().backward()
        pairs = [(y, mine[4]), (here.grad, mine[5])]
        pairs += [(a.grad, b.grad[lives]) for a, b in zip(tensors(own), tensors(judge), strict=True)]
        error = max(float((a - b).detach().abs().max()) if a.numel() else 0.0 for a, b in pairs)
        rows = torch.bincount(step.owners.slot_of(Routing.from_topk(mine[1], mine[2], num_experts=E)) // (2 + spare),
                              minlength=4)  # fmt: skip
        dist.all_reduce(rows)
        found[f"error {spare}"], found[f"sent {spare}"] = error, step.sent
        found[f"busiest {spare}"] = float(rows.max() / rows.double().mean())
    with pytest.raises(ShapeError, match="be of the 2 that live here"):
        step.gather(_weights())
    return found


@pytest.mark.slow
def test_a_step_with_copies_is_the_step_without() -> None:
    """Values, tokens' gradients and experts' gradients at home; each copy travels once; the busiest has less to do."""
    found = spawn(4, _step)
    for spare in (0, 1, 3):
        assert all(one[f"error {spare}"] < 1e-11 for one in found), found
        assert sum(one[f"sent {spare}"] for one in found) == 4 * spare
    busiest = [found[0][f"busiest {spare}"] for spare in (0, 1, 3)]
    assert busiest[0] > busiest[1] > busiest[2], busiest
    assert busiest[2] <= 1.05, busiest  # the planner's goal, where there is room for it


class _Group:
    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0


def test_refusals() -> None:
    """A home with copies, and an expert that is not at home."""
    home = Owners.even(4, _Group())
    with pytest.raises(UsageError, match="in several slots"):
        Materialise(Owners(torch.tensor([0, 1, 2, 0, 2, 3]), 4, _Group()), home)
    with pytest.raises(UsageError, match="expert 1 not on process 0"):
        Materialise(home, Owners(torch.tensor([0, 2, 1, 3]), 4, _Group()))
