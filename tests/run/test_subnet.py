"""Processes that run different parts of a sharded model: torch's silent error, the refusal, and the exact union."""

import time
from collections.abc import Sequence

import pytest
import torch
from processes import spawn
from torch import Tensor, nn

from turnout.errors import UsageError
from turnout.run.ranks.processes import Ranks
from turnout.run.ranks.shard import mesh, shard
from turnout.run.ranks.subnet import agreed, subnet
from turnout.run.ranks.whole import settle, whole_gradients
from turnout.types.layout import Layout

# What each of two processes runs: other blocks, other numbers of them, another order.
PARTS = [([0, 1], [2, 1]), ([0], [1, 2, 3]), ([1, 3], [3, 1]), ([], [2])]

LAYOUTS = [Layout(dp_shard=2), Layout(dp_shard=2, zero=2), Layout(dp_shard=2, zero=0)]


class Super(nn.Module):
    """A supernet: a stem, and those blocks that are asked for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor, which: Sequence[int]) -> Tensor:
        x = self.stem(x)
        for number in which:
            x = torch.tanh(self.blocks[number](x))
        return self.head(x)


def _x(rank: int) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(rank))


def _sharded(layout: Layout) -> nn.Module:
    return shard(Super(), layout, mesh(layout))


def _names(which: Sequence[int]) -> list[str]:
    return [f"blocks.{number}" for number in which]


def unguarded(ranks: Ranks) -> float:
    """How far off torch's own forward pass is when blocks differ; the off arm."""
    which = PARTS[0][ranks.rank]
    return float((_sharded(Layout(dp_shard=2))(_x(ranks.rank), which) - Super()(_x(ranks.rank), which)).abs().max())


def refused(ranks: Ranks) -> tuple[str, float, bool]:
    """What it says, after how long, and that the model still works when all run the same."""
    model, said, took = _sharded(Layout(dp_shard=2)), "nothing", []
    for _ in range(3):  # the least of them: the machine has other things to do
        start = time.monotonic()
        try:
            with subnet(model, _names(PARTS[0][ranks.rank])):
                pass
        except UsageError as error:
            said = str(error)
        took.append(time.monotonic() - start)
    with subnet(model, _names([0, 2])):
        y = model(_x(0), [0, 2])
    return said, min(took), bool(torch.allclose(y, Super()(_x(0), [0, 2])))


def union(ranks: Ranks) -> list[str]:
    """What is wrong with values and gradients, over all layouts and parts, twice each."""
    return [f"{layout}: {each}" for layout in LAYOUTS for each in _wrong(ranks, layout)]


def _wrong(ranks: Ranks, layout: Layout) -> list[str]:
    model, wrong = _sharded(layout), list[str]()
    for parts in [*PARTS, *PARTS]:
        one = Super()
        for rank, which in enumerate(parts):
            one(_x(rank), which).sum().backward()
        which = parts[ranks.rank]
        settle(model)
        model.zero_grad()
        with subnet(model, _names(which), how="union"):
            y = model(_x(ranks.rank), which)
            y.sum().backward()
        if not torch.allclose(y, Super()(_x(ranks.rank), which), atol=1e-6):
            wrong.append(f"{parts}: values")
        want = dict(one.named_parameters())
        for name, grad in whole_gradients(model):
            other = want[name].grad
            if (grad is None) != (other is None) or (grad is not None and not torch.allclose(grad, other, atol=1e-6)):
                wrong.append(f"{parts}: {name}")
        with torch.no_grad(), subnet(model, _names(which), how="union"):
            if not torch.allclose(model(_x(ranks.rank), which), y, atol=1e-6):
                wrong.append(f"{parts}: without gradients")
    return wrong


def strange(ranks: Ranks) -> list[str]:
    """What is said of a part that is not there, on one process and on both; of parts that cannot be joined."""
    model, said = _sharded(Layout(dp_shard=2)), []
    for names in (["blocks.9"] if ranks.rank else ["blocks.1"], ["blocks.9"], ["stem"] if ranks.rank else ["head"]):
        try:
            with subnet(model, names, how="union"):
                said.append("nothing")
        except UsageError as error:
            said.append(str(error))
    return said


@pytest.mark.slow
def test_torch_alone_is_silently_wrong() -> None:
    """The reason for all this; when torch refuses it by itself, this fails and the guard can be looked at again."""
    assert all(off > 0.1 for off in spawn(2, unguarded))


@pytest.mark.slow
def test_other_parts_are_refused_on_every_process() -> None:
    """In less than a second, with the names of each."""
    for said, took, works in spawn(2, refused):
        assert "blocks.0, blocks.1 on rank 0; blocks.2, blocks.1 on rank 1" in said
        assert took < 1.0
        assert works


@pytest.mark.slow
def test_the_union_is_exact() -> None:
    """Values and gradients are those of one process that ran both parts; a part that nobody ran has none."""
    assert spawn(2, union) == [[], []]


@pytest.mark.slow
def test_what_cannot_be_joined_is_named() -> None:
    """On both processes, also where only one is at fault."""
    for absent, both, held in spawn(2, strange):
        assert "blocks.9" in absent
        assert "blocks.9" in both
        assert "head on rank 0; stem on rank 1" in held


def test_alone_all_agree() -> None:
    """Without processes there is nobody to differ from, and names are still looked at."""
    assert agreed(["a"])
    with subnet(Super(), ["blocks.1"]):
        pass
    with pytest.raises(UsageError, match=r"blocks.1"), subnet(Super(), ["blocks.11"]):
        pass
