"""Claim: where two tasks need different weights, merging by Fisher information beats the plain average."""

import copy
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.claims.claim import Claim, Evidence
from turnout.claims.trial import Note
from turnout.reshape.average import average
from turnout.reshape.fisher import fisher as merge
from turnout.reshape.fisher import fisher_information
from turnout.reshape.task_vectors import task_vectors

_SEEDS = (0, 1, 2, 3, 4)
_WIDTH, _HIDDEN, _LABELS = 32, 64, 4
_START_STEPS, _STEPS, _BATCH, _EXAMPLES = 50, 400, 64, 256


def fisher(*, note: Note = None) -> Claim:
    """Two networks tuned from one start on tasks that read different inputs: Fisher merging loses less than averaging.

    Task A reads the first half of the inputs (the rest is noise of a tenth), task B the second, so each model's loss is
    steep in its own half of the first layer. The second control gives each model the other one's information.

    >>> fisher.__name__  # the run itself takes half a minute: turnout verify fisher
    'fisher'

    Source: Matena and Raffel, 2022, "Merging Models with Fisher-Weighted Averaging".
    """
    began = time.perf_counter()
    found: dict[str, list[float]] = {"fisher": [], "average": [], "swapped": [], "summed": []}
    for seed in _SEEDS:
        tasks = [_Task(seed, half) for half in range(2)]
        start = _network(seed)
        _tune(start, tasks, seed, _START_STEPS)
        models = [copy.deepcopy(start) for _ in tasks]
        for model, task in zip(models, tasks, strict=True):
            _tune(model, [task], seed + 100, _STEPS)
        steep = [
            fisher_information(model, [task.draw(_EXAMPLES, seed + 200)[0]])
            for model, task in zip(models, tasks, strict=True)
        ]
        merged = {"fisher": merge(models, steep)[0], "average": average(models)[0]}
        merged["swapped"] = merge(models, steep[::-1])[0]
        merged["summed"] = task_vectors(start, models)[0]
        for name, model in merged.items():
            found[name].append(_loss(model, tasks))
        if note:
            each = ", ".join(f"{values[-1]:.4f} {name}" for name, values in found.items())
            alone = [_loss(model, [task]) for model, task in zip(models, tasks, strict=True)]
            other = [_loss(model, [task]) for model, task in zip(models, tasks[::-1], strict=True)]
            ends = f"tuned models {sum(alone) / 2:.4f} on their own task, {sum(other) / 2:.4f} on the other"
            note(f"seed {seed}: {each}; start {_loss(start, tasks):.4f}; {ends}")
    metric, ours = "held-out loss, mean of both tasks (nats)", tuple(found["fisher"])
    return Claim(
        name="fisher",
        statement="Merging two tuned networks by Fisher information loses less on both tasks than averaging them.",
        source="Matena and Raffel, 2022, Merging Models with Fisher-Weighted Averaging",
        evidence=(
            Evidence(metric, "below", ours, tuple(found["average"]), "plain average"),
            Evidence(metric, "below", ours, tuple(found["swapped"]), "each with the other's information"),
        ),
        seconds=time.perf_counter() - began,
        note=f"made-up tasks: {_LABELS} labels by a random teacher from one half of {_WIDTH} inputs; hidden {_HIDDEN}; "
        f"{_START_STEPS} steps on both, {_STEPS} on each; information exact over labels on {_EXAMPLES} examples; "
        f"equal weights, none tuned; both task vectors added to the start: {statistics.fmean(found['summed']):.3f}",
    )


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
