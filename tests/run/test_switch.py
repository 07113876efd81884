"""One layout, every parallelism: outputs and gradients of one process; and all-to-alls in two stages."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from processes import spawn
from torch import Tensor

from turnout.errors import ShapeError, UsageError
from turnout.run import execute
from turnout.run.ranks.exchange import counts_from, exchange
from turnout.run.ranks.nodes import Nodes
from turnout.run.ranks.processes import Ranks
from turnout.run.ranks.switch import Switch
from turnout.types import ExpertWeights, Routing

D, F, K = 6, 8, 2
COUNTS = [5, 0, 3, 6]  # tokens of each process
# Experts, activation, whether gates and values alternate, biases.
CASES = {
    "shared by two": (2, "swiglu", True, False),
    "shared by all": (1, "swiglu", False, False),
    "two each": (8, "relu", False, True),
}


def _weights(experts: int, activation: str, interleaved: bool, bias: bool) -> ExpertWeights:
    chance = torch.Generator().manual_seed(experts)
    wide = 2 * F if "swiglu" in activation else F

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=chance, dtype=torch.float64)

    biases = (drawn(experts, wide), drawn(experts, D)) if bias else (None, None)
    return ExpertWeights(drawn(experts, D, wide), drawn(experts, F, D), *biases, activation, interleaved)


def _leaves(weights: ExpertWeights) -> ExpertWeights:
    own = {f.name: getattr(weights, f.name) for f in dataclasses.fields(weights)}
    own = {name: one.detach().clone().requires_grad_() for name, one in own.items() if isinstance(one, Tensor)}
    return dataclasses.replace(weights, **own)


def _run(x: Tensor, index: Tensor, gate: Tensor, slope: Tensor, weights: ExpertWeights, run) -> list[Tensor]:
    """The output, and the gradients of tokens, gates, and weights, put back as the weights are."""
    x, gate = x.clone().requires_grad_(), gate.clone().requires_grad_()
    routing = Routing.from_topk(index, gate, num_experts=int(run.experts))
    y = run(x, routing, weights)
    (y * slope).sum().backward()
    return [y.detach(), x.grad, gate.grad]


def _gradients(weights: ExpertWeights) -> ExpertWeights:
    own = {f.name: getattr(weights, f.name) for f in dataclasses.fields(weights)}
    return dataclasses.replace(weights, **{name: one.grad for name, one in own.items() if isinstance(one, Tensor)})


class _With:
    def __init__(self, experts: int, call) -> None:
        self.experts, self.call = experts, call

    def __call__(self, *arguments):
        return self.call(*arguments)


def _all(ranks: Ranks) -> list[str]:
    wrong = []
    for case, (experts, *kind) in CASES.items():
        chance = torch.Generator().manual_seed(1)
        T, k = sum(COUNTS), min(K, experts)
        x = torch.randn(T, D, generator=chance, dtype=torch.float64)
        index = torch.rand(T, experts, generator=chance).argsort(1)[:, :k]
        gate, slope = (torch.rand(T, n, generator=chance, dtype=torch.float64) for n in (k, D))
        judge = _leaves(_weights(experts, *kind))
        want = _run(x, index, gate, slope, judge, _With(experts, execute))
        switch = Switch(experts, dist.group.WORLD)
        own = _leaves(switch.part(_weights(experts, *kind)))
        want_own = switch.part(_gradients(judge))
        mine = [each.split(COUNTS)[ranks.rank] for each in (x, index, gate, slope)]
        for degree in switch.degrees:
            for name in ("up_EDH", "down_EFD", "up_bias_EH", "down_bias_ED"):
                if getattr(own, name) is not None:
                    getattr(own, name).grad = None
            before = own.up_EDH.data_ptr()
            call = _With(experts, lambda x, routing, w, s=switch, d=degree: s(x, routing, w, d))
            got = _run(*mine, own, call)
            pairs = list(zip(got, [each.split(COUNTS)[ranks.rank] for each in want], strict=True))
            pairs += [
                (getattr(own, name).grad, getattr(want_own, name))
                for name in ("up_EDH", "down_EFD", "up_bias_EH", "down_bias_ED")
                if getattr(own, name) is not None
            ]
            for part, (a, b) in enumerate(pairs):
                if a.shape != b.shape or (a.numel() and not torch.allclose(a, b, rtol=0, atol=1e-11)):
                    wrong.append(f"{case}, degree {degree}, part {part}")
            assert own.up_EDH.data_ptr() == before
        assert switch.degrees == {2: (0, 1, 2), 1: (0, 1, 2, 4), 8: (0, 1)}[experts]
    return wrong


def _two_stages(ranks: Ranks) -> list[str]:
    """Against one stage, with uneven parts and empty ones; values and gradients."""
    world, wrong = ranks.world, []
    for per_node in (2,):
        nodes = Nodes(dist.group.WORLD, per_node)
        assert nodes.messages == per_node - 1 + world // per_node - 1
        for seed in range(3):
            chance = torch.Generator().manual_seed(10 * seed + ranks.rank)
            sent = torch.randint(4 if seed else 1, (world,), generator=chance)
            rows = torch.randn(int(sent.sum()), 3, generator=chance, requires_grad=True)
            received = counts_from(sent[:, None], dist.group.WORLD).flatten().tolist()
            want = exchange(rows, sent.tolist(), received, dist.group.WORLD)
            got, counts = nodes.exchange(rows, sent.tolist())
            slope = torch.randn(want.shape, generator=chance)
            (a,), (b,) = (torch.autograd.grad((one * slope).sum(), rows) for one in (got, want))
            if counts != received or not torch.equal(got, want) or not torch.equal(a, b):
                wrong.append(f"{per_node} a node, seed {seed}")
    return wrong


def _both(ranks: Ranks) -> list[str]:
    return _all(ranks) + _two_stages(ranks)


@pytest.mark.slow
def test_every_parallelism_and_both_ways_give_what_one_process_gives() -> None:
    """On four ranks, one of which has no tokens."""
    assert spawn(4, _both) == [[], [], [], []]


class _Group:
    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


def test_refusals() -> None:
    """By name, before anything is sent."""
    with pytest.raises(UsageError, match="pass 8 experts"):
        Switch(6, _Group(4))
    with pytest.raises(UsageError, match="per_node=2"):
        Nodes(_Group(4), 3)


def _refused(ranks: Ranks) -> list[str]:
    switch = Switch(1, dist.group.WORLD)
    found = []
    for biased in (ExpertWeights(torch.ones(1, 2, 6), torch.ones(1, 3, 2)), _weights(1, "relu", False, True)):
        with pytest.raises(UsageError) as error:
            switch.part(biased)
        found.append(str(error.value))
    own = switch.part(ExpertWeights(torch.ones(1, 2, 8), torch.ones(1, 4, 2)))
    routing = Routing.from_topk(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), num_experts=1)
    with pytest.raises(UsageError, match=r"be in \(0, 1, 2\)"):
        switch(torch.ones(1, 2), routing, own, 3)
    with pytest.raises(ShapeError, match="of 1"):
        switch(torch.ones(1, 2), routing, dataclasses.replace(own, up_EDH=torch.ones(2, 2, 4)), 1)
    return found


@pytest.mark.slow
def test_what_cannot_be_cut_is_refused() -> None:
    """Hidden units that do not divide, and biases that none of the sharers could own alone."""
    for units, biased in spawn(2, _refused):
        assert "3 hidden units" in units and "biases" in biased
