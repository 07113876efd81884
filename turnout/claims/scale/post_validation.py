"""Claim: stages that step before the gradients' norm is known, and take it back, train as those that wait."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.digits import CLASSES, SIDE, digits
from turnout.decide.device import zb_automatic
from turnout.solve.pipeline import pipeline
from turnout.train.post_validation import PostValidation
from turnout.types.stage_costs import StageCosts

_STAGES, _WIDTH, _STEPS, _BATCH, _RATE, _CLIP = 4, 48, 120, 64, 3e-3, 1.0
_LARGE, _BROKEN = 5, 17  # every so many steps a batch weighs five times as much, or a gradient overflows
# F, I, W and a message of a 1.5B model on eight devices, in ms, as Qi et al. profiled them; 24 microbatches.
_PROFILE, _DEVICES, _MICROBATCHES = {"forward": 18.522, "input": 18.086, "weight": 9.337, "send": 0.601}, 8, 24


def _stages(seed: int) -> nn.ModuleList:
    sizes = [SIDE * SIDE, *[_WIDTH] * (_STAGES - 1), CLASSES]
    generator = torch.Generator().manual_seed(seed)
    stages = nn.ModuleList()
    for before, after in itertools.pairwise(sizes):
        stages.append(nn.Linear(before, after))
        for parameter in stages[-1].parameters():
            nn.init.normal_(parameter, 0, before**-0.5 if parameter.ndim > 1 else 0.0, generator=generator)
    return stages


def _backward(stages: nn.ModuleList, step: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed * 10_000 + step)
    class_B = torch.randint(CLASSES, (_BATCH,), generator=generator)
    x_BD = digits(class_B, torch.zeros(_BATCH, dtype=torch.long), generator)
    for stage in stages[:-1]:
        x_BD = torch.relu(stage(x_BD))
    weight = 5.0 if step % _LARGE == 1 else 0.5
    (weight * F.cross_entropy(stages[-1](x_BD), class_B)).backward()
    if step % _BROKEN == 3:  # the sum over tokens of one weight's gradient, in a format that is too narrow for it
        last: Any = stages[-1]
        last.weight.grad.fill_(torch.inf)


def stubborn(self: PostValidation, total: Tensor) -> None:
    """The off arm's ``validate``: a step that was done stays done."""
    stepped, self._kept = self._kept is not None, None
    if stepped:
        self.optimizer.zero_grad(set_to_none=True)
    else:
        _whole(self, total)


_whole = PostValidation.validate


def measure(seed: int) -> Values:
    """The weights' largest distance from those of an optimizer that waits, with and without taking steps back."""
    found: dict[str, float] = {}
    taken = 0
    for name, back in (("post", True), ("stubborn", False)):
        early, late = _stages(seed), _stages(seed)
        posts = [PostValidation(torch.optim.AdamW(stage.parameters(), lr=_RATE), clip=_CLIP) for stage in early]
        waits = [PostValidation(torch.optim.AdamW(stage.parameters(), lr=_RATE), clip=_CLIP) for stage in late]
        apart = 0.0
        for step in range(_STEPS):
            _backward(early, step, seed)
            _backward(late, step, seed)
            total = torch.zeros((), dtype=torch.float64)
            for post in posts:
                total = post.eager(total)
            for post in posts:
                verdict = post.validate(total) if back else stubborn(post, total)
                taken += back and verdict is not None and verdict.redone
            _wait(waits)
            apart = max(apart, _distance(early, late))
        found[name] = apart
    return {**found, "redone": taken / _STAGES / _STEPS, **_bubbles()}


def _wait(stages: list[PostValidation]) -> None:
    """The reference: all norms first, then all steps."""
    total = torch.zeros((), dtype=torch.float64)
    for stage in stages:
        gradients = [p.grad for group in stage.optimizer.param_groups for p in group["params"]]
        total = total + sum((g.double().square().sum() for g in gradients), torch.zeros((), dtype=torch.float64))
    norm = total.sqrt()
    for stage in stages:
        if torch.isfinite(norm):
            if norm > _CLIP:
                for group in stage.optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad *= _CLIP / (float(norm) + 1e-6)
            stage.optimizer.step()
        stage.optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _distance(early: nn.Module, late: nn.Module) -> float:
    pairs = zip(early.parameters(), late.parameters(), strict=True)
    return max(float((one - other).abs().max()) for one, other in pairs)


def _bubbles() -> Values:
    costs = StageCosts.even(_DEVICES, **_PROFILE)
    times = pipeline(zb_automatic(costs, _MICROBATCHES, memory=2.0 * _DEVICES), costs)
    return {"bubble": times.span_bubble, "bubble_barrier": times.bubble}


def post_validation() -> Claim:
    """Steps that are taken back leave, to the bit, what an optimizer that waits for the norm of all gradients leaves.

    The off arm takes nothing back: a step that was done too early stays done.

    >>> post_validation().simulated
    True

    Source: Qi et al., 2024, "Zero Bubble Pipeline Parallelism", section 4, whose time is simulated here: four stages
    are played one after the other, and what idles is computed from the paper's profile of a 1.5B model.
    """
    return Claim(
        name="post_validation",
        statement="A pipeline whose stages step at once, and take a step back where the norm of all gradients, known "
        "later, forbids it, trains to the bit as one that waits for the norm; without the wait devices idle less.",
        source='Qi et al., 2024, "Zero Bubble Pipeline Parallelism", section 4.',
        off="A step that was done too early stays done.",
        switched={"post": "stubborn"},
        rows=(
            Row("largest distance of a weight from an optimizer that waits", "within", "post", "stubborn",
                "steps that stay done", bound=0.0),
            Row("share of a step in which devices idle, ZB-2p, simulated", "below", "bubble", "bubble_barrier",
                "a barrier before the step", headline=True),
        ),
        measure=measure,
        seconds=5.0,
        note="Of all stages' steps {redone:.3f} were taken back. The idle share is of the paper's 1.5B profile on "
        "eight devices with 24 microbatches, and is the same for every seed.",
        simulated=True,
    )  # fmt: skip
