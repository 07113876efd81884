"""Claim: tasks that share skills learn more from them than from skills at random, or one model for all."""

import itertools
import math

import torch
from torch import Tensor

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.moe.clustered import OUT, WIDTH
from turnout.decide.token import Skills
from turnout.layers import MoE, given

_SKILLS, _EXAMPLES, _TEST, _STEPS, _HIDDEN = 5, 96, 300, 500, 16
_PAIRS = tuple(itertools.combinations(range(_SKILLS), 2))


def skill_net() -> Claim:
    """Ten tasks, each the sum of two of five functions and one that all have; 96 examples a task.

    >>> skill_net().off
    "the tasks have one another's skills"

    Source: Dai et al., 2022, "One Model, Multiple Modalities: A Sparsely Activated Approach for Text, Sound, Image,
    Video and Code" (SkillNet), table 2.
    """
    error = "held-out error / variance"
    return Claim(
        name="skill_net",
        statement="Experts that are shared by the tasks which need them learn more than experts shared at random, one "
        "dense network of the same active size, or a model for each task.",
        source="Dai et al., 2022, SkillNet",
        off="the tasks have one another's skills",
        switched={"right": "permuted"},
        rows=(
            Row(error, "below", "right", "permuted", "the tasks have one another's skills"),
            Row(error, "below", "right", "dense", "one network of the same active size", headline=True),
            Row(error, "below", "right", "separate", "a model for each task", headline=True),
        ),
        measure=_measure,
        seconds=20,
        note=f"ten tasks of {_EXAMPLES} examples, {_SKILLS} skills and a common one of {_HIDDEN} units, {_STEPS} steps",
    )


def _measure(seed: int) -> Values:
    tasks, chance = len(_PAIRS), torch.Generator().manual_seed(seed + 3)
    up = torch.randn(_SKILLS + 1, WIDTH, 12, generator=chance) * 1.5 / math.sqrt(WIDTH)
    down = torch.randn(_SKILLS + 1, 12, OUT, generator=chance) / math.sqrt(12)
    skills_N3 = torch.tensor([[*pair, _SKILLS] for pair in _PAIRS])

    def target(x_TD: Tensor, task_T: Tensor) -> Tensor:
        each = skills_N3[task_T]
        hidden = torch.einsum("td,tsdh->tsh", x_TD, up[each]).tanh()
        return torch.einsum("tsh,tsho->to", hidden, down[each])

    def drawn(count: int) -> tuple[Tensor, Tensor, Tensor]:
        task_T = torch.arange(tasks).repeat_interleave(count)
        x_TD = torch.randn(len(task_T), WIDTH, generator=chance)
        return x_TD, task_T, target(x_TD, task_T)

    train, test = drawn(_EXAMPLES), drawn(_TEST)
    order = torch.randperm(tasks, generator=chance).tolist()
    right = [row.tolist() for row in skills_N3]
    arms = {
        "right": (right, _SKILLS + 1, _HIDDEN),
        "permuted": ([right[number] for number in order], _SKILLS + 1, _HIDDEN),
        "dense": ([[0]] * tasks, 1, 3 * _HIDDEN),
        "separate": ([[task] for task in range(tasks)], tasks, 3 * _HIDDEN),
    }
    return {name: _run(seed, table, experts, hidden, train, test) for name, (table, experts, hidden) in arms.items()}


def _run(
    seed: int,
    table: list[list[int]],
    experts: int,
    hidden: int,
    train: tuple[Tensor, Tensor, Tensor],
    test: tuple[Tensor, Tensor, Tensor],
) -> float:
    router = Skills(WIDTH, experts, top_k=max(map(len, table)), table=table)
    start = torch.Generator().manual_seed(seed)
    layer = MoE(WIDTH, hidden, experts, router=router, activation="relu", bias=True, std=0.18, generator=start)
    adam = torch.optim.AdamW(layer.parameters(), lr=3e-3, weight_decay=0.02)
    cosine = torch.optim.lr_scheduler.LambdaLR(adam, lambda t: 0.1 + 0.45 * (1 + math.cos(math.pi * t / _STEPS)))
    chance, (x_TD, task_T, y_TO) = torch.Generator().manual_seed(seed), train

    def made(x: Tensor, task: Tensor) -> Tensor:
        with given(task_B=task):  # each row is a sequence of one token; the mean of its skills, so three times that
            return layer(x[:, None]).output[:, 0, :OUT] * max(map(len, table))

    for _ in range(_STEPS):
        row_N = torch.randint(len(x_TD), (256,), generator=chance)
        loss = (made(x_TD[row_N], task_T[row_N]) - y_TO[row_N]).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        cosine.step()
    x_TD, task_T, y_TO = test
    with torch.no_grad():
        return float((made(x_TD, task_T) - y_TO).square().sum() / (y_TO - y_TO.mean(0)).square().sum())
