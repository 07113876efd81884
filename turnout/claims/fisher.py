"""Claim: where two tasks need different weights, merging by Fisher information beats the plain average."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.claims.claim import Claim, Row, Values
from turnout.reshape.many_to_one.average import average
from turnout.reshape.many_to_one.fisher import fisher as merge
from turnout.reshape.many_to_one.fisher import fisher_information
from turnout.reshape.many_to_one.task_vectors import task_vectors

_WIDTH, _HIDDEN, _LABELS = 32, 64, 4
_START_STEPS, _STEPS, _BATCH, _EXAMPLES = 50, 400, 64, 256


def fisher() -> Claim:
    """Two networks tuned from one start on tasks that read different inputs: Fisher merging loses less than averaging.

    Task A reads the first half of the inputs (the rest is noise of a tenth), task B the second, so each model's loss is
    steep in its own half of the first layer. The second control gives each model the other one's information.

    >>> fisher().off
    'equal information: the plain average'

    Source: Matena and Raffel, 2022, "Merging Models with Fisher-Weighted Averaging".
    """
    loss = "held-out loss, mean of both tasks (nats)"
    return Claim(
        name="fisher",
        statement="Merging two tuned networks by Fisher information loses less on both tasks than averaging them.",
        source="Matena and Raffel, 2022, Merging Models with Fisher-Weighted Averaging",
        off="equal information: the plain average",
        switched={"fisher": "average"},
        rows=(
            Row(loss, "below", "fisher", "average", "plain average"),
            Row(loss, "below", "fisher", "swapped", "each with the other's information"),
        ),
        measure=_measure,
        seconds=2,
        note=f"made-up tasks: {_LABELS} labels by a random teacher from one half of {_WIDTH} inputs; hidden {_HIDDEN}; "
        f"{_START_STEPS} steps on both, {_STEPS} on each; information exact over labels on {_EXAMPLES} examples; "
        "equal weights, none tuned; both task vectors added to the start: {summed:.3f}",
    )


def _measure(seed: int) -> Values:
    tasks = [_Task(seed, half) for half in range(2)]
    start = _network(seed)
    _tune(start, tasks, seed, _START_STEPS)
    models = [copy.deepcopy(start) for _ in tasks]
    for model, task in zip(models, tasks, strict=True):
        _tune(model, [task], seed + 1000, _STEPS)
    steep = [
        fisher_information(model, [task.draw(_EXAMPLES, seed + 2000)[0]])
        for model, task in zip(models, tasks, strict=True)
    ]
    merged = {
        "fisher": merge(models, steep)[0],
        "average": average(models)[0],
        "swapped": merge(models, steep[::-1])[0],
        "summed": task_vectors(start, models)[0],
    }
    return {name: _loss(model, tasks) for name, model in merged.items()}


class _Task:
    """Labels by a random teacher from one half of the inputs; the other half is noise of a tenth."""

    def __init__(self, seed: int, half: int) -> None:
        generator = torch.Generator().manual_seed(1000 * seed + half)
        self.seed, self.half = seed, half
        self.first = torch.randn(_WIDTH // 2, 16, generator=generator) / (_WIDTH // 2) ** 0.5
        self.second = torch.randn(16, _LABELS, generator=generator)

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """(B, D) inputs and (B,) labels."""
        generator = torch.Generator().manual_seed(10_000 * self.seed + 10 * seed + self.half)
        x_BD = torch.randn(count, _WIDTH, generator=generator) * 0.1
        mine = slice(self.half * _WIDTH // 2, (self.half + 1) * _WIDTH // 2)
        x_BD[:, mine] *= 10
        return x_BD, ((x_BD[:, mine] @ self.first).tanh() @ self.second).argmax(1)


def _network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(_WIDTH, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _LABELS))


def _tune(model: nn.Module, tasks: list[_Task], seed: int, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        pairs = [task.draw(_BATCH, 1000 * seed + step) for task in tasks]
        loss = torch.stack([F.cross_entropy(model(x_BD), label_B) for x_BD, label_B in pairs]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def _loss(model: nn.Module, tasks: list[_Task]) -> float:
    pairs = [task.draw(4096, 999_999) for task in tasks]
    return sum(float(F.cross_entropy(model(x_BD), label_B)) for x_BD, label_B in pairs) / len(pairs)
