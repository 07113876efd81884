"""Claim: rates scaled by how much each module's gradient varies get further in a few steps than one rate."""

from collections.abc import Callable

import torch
from torch import nn

from turnout.claims.claim import Claim, Row, Values
from turnout.train import AGVM

_SIZE, _STEPS, _NOISES = 2000, 60, (2.0, 0.5, 0.1)  # anchor, neck, head: standard deviations of an entry
_RATES = tuple(0.01 * 2 ** (step / 4) for step in range(21))  # to 0.32; coarser steps pass a best rate by


def agvm() -> Claim:
    """Three modules with gradients of unlike variance, each drawn to its target; the best of 21 rates on either side.

    The modules stand for backbone, neck and head; the off arm steps all at the same rate.

    >>> agvm().off
    'one rate for all modules'

    Source: Xue et al., 2022, "Large-batch Optimization for Dense Visual Predictions".
    """
    error = "mean squared distance to the target after sixty steps"
    return Claim(
        name="agvm",
        statement="The ratio of modules' gradient variances is measured from two halves of a batch, and SGD's steps "
        "scaled by it get nearer to the target in as many steps than steps at one rate.",
        source="Xue et al., 2022, Large-batch Optimization for Dense Visual Predictions (AGVM)",
        off="one rate for all modules",
        switched={"AGVM": "one rate", "AGVM, Adam": "one rate, Adam", "misjudged": "misjudged, alike"},
        rows=(
            Row(f"{error}, SGD", "below", "AGVM", "one rate", "the best single rate"),
            Row(f"{error}, AdamW", "below", "AGVM, Adam", "one rate, Adam", "the best single rate", headline=True),
            Row("relative error of the planted ratios of phi", "within", "misjudged", "misjudged, alike",
                "all modules taken to be alike", bound=0.1),
        ),
        measure=_measure,
        seconds=7,
        note=f"modules of {_SIZE} numbers, noise {_NOISES} on a gradient that is the distance, {_STEPS} steps, looks "
        "every five; each arm has the best of 21 rates, and with rates twice one another AdamW's best single one is "
        "passed by. No detector is trained: the paper's results on COCO are not measured here",
        limits=(0.0, 1000.0),
    )  # fmt: skip


def _measure(seed: int) -> Values:
    sgd, adam = torch.optim.SGD, torch.optim.AdamW
    found = {}
    for name, kind, on in (
        ("AGVM", sgd, True), ("one rate", sgd, False), ("AGVM, Adam", adam, True), ("one rate, Adam", adam, False)
    ):  # fmt: skip
        found[name] = min(_distance(kind, rate, on, seed) for rate in _RATES)
    chance = torch.Generator().manual_seed(seed)
    modules = [nn.Parameter(torch.ones(10 * _SIZE)) for _ in _NOISES]
    looker = AGVM(sgd([{"params": [one]} for one in modules], lr=0.1), momentum=0.0)
    looker.look(*[_half(modules, chance) for _ in range(2)])
    # Of a gradient of ones with noise of deviation s on a half, the cosine is 1 / (1 + s^2).
    planted = [s**2 / (1 + s**2) for s in _NOISES]
    pairs = list(zip(looker.phi, planted, strict=True))
    worst = max(abs((phi / looker.phi[0]) / (true / planted[0]) - 1) for phi, true in pairs)
    alike = max(abs(planted[0] / true - 1) for true in planted)
    return found | {"misjudged": worst, "misjudged, alike": alike}


def _half(modules: list[nn.Parameter], chance: torch.Generator) -> list[torch.Tensor | None]:
    """Each module's gradient on a half of the batch."""
    pairs = zip(modules, _NOISES, strict=True)
    return [one.detach() + noise * torch.randn(one.shape, generator=chance) for one, noise in pairs]


def _distance(kind: Callable[..., torch.optim.Optimizer], rate: float, on: bool, seed: int) -> float:
    chance = torch.Generator().manual_seed(seed)
    modules = [nn.Parameter(torch.ones(_SIZE)) for _ in _NOISES]
    optimizer = kind([{"params": [one]} for one in modules], lr=rate)
    scaled = AGVM(optimizer, momentum=0.8)
    for _ in range(_STEPS):
        first, second = _half(modules, chance), _half(modules, chance)
        if on and scaled.looks:
            scaled.look(first, second)
        for one, a, b in zip(modules, first, second, strict=True):
            assert a is not None and b is not None, "every module has a gradient"
            one.grad = (a + b) / 2
        scaled.step()
    return float(torch.stack([one.detach().square().mean() for one in modules]).mean())
