"""Claim: gates trained for each adapter alone choose the right adapter for every token."""

import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, nn

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.subspaces import OUT, RANK, TASKS, WIDTH, World
from turnout.decide.token import PHATGOOSE
from turnout.reshape import train_gates
from turnout.reshape.adapters.routers import Site

_STEPS = 100
_FAR = "means of the tasks twice as far from 0, top 1: "


def phatgoose() -> Claim:
    """Routed by their gates, four adapters lose less than their mean, and than when Arrow or chance routes them.

    The first adapter of a token is the right one nine times in ten.

    >>> phatgoose().off
    'random gates'

    Source: Muqeeth et al., 2024, "Learning to Route Among Specialized Experts for Zero-Shot Generalization".
    """
    metric, sent = "squared error over that of each token's own adapter", "share of tokens sent elsewhere"
    gates = "random gates"
    return Claim(
        name="phatgoose",
        statement="Gates trained for each adapter alone, without the others' data, choose the right one for a token.",
        source="Muqeeth et al., 2024, PHATGOOSE",
        off=gates,
        switched={"gates": "random", "wrong": "chance", "far": "far, random"},
        rows=(
            Row(metric, "below", "gates", "random", gates),
            Row(sent, "within", "wrong", "chance", gates, bound=0.1),
            Row(_FAR + metric, "within", "far", "far, random", gates, bound=1.05),
            Row(metric, "below", "gates", "mean", "the mean of all adapters", headline=True),
            Row(metric, "below", "gates", "arrow", "Arrow, which sees no data", headline=True),
        ),
        measure=_measure,
        seconds=3,
        note=f"{TASKS} tasks on disjoint subspaces of width {WIDTH}, a linear map to {OUT}, adapters of rank {RANK}, "
        f"{_STEPS} steps a gate; top 2, with top 1 the ratio is {{one:.2f}}. What is left to 1 are tokens whose own "
        "part points against the mean of their task: one direction cannot know them. With means twice as far from 0 "
        "there are few of those; top 2 is at {far, top 2:.2f} there, for the weight that the second adapter gets",
        limits=(0.0, 100.0),
    )


def _measure(seed: int) -> Values:
    with tempfile.TemporaryDirectory(prefix="turnout-claim-") as folder:
        world = trained(World(seed, folder))
        oracle = world.oracle()
        ours, random = world.score("phatgoose"), world.score(_random(seed))
        found = {
            "gates": ours.loss / oracle,
            "one": world.score("phatgoose", options={"top_k": 1}).loss / oracle,
            "arrow": world.score("arrow", options={"top_k": TASKS}).loss / oracle,
            "random": random.loss / oracle,
            "mean": world.score("even").loss / oracle,
            "wrong": ours.wrong,
            "chance": random.wrong,
        }
    with tempfile.TemporaryDirectory(prefix="turnout-claim-") as folder:
        far = trained(World(seed, folder, distance=4.0))
        oracle = far.oracle()
        one: dict[str, object] = {"top_k": 1}
        return found | {
            "far": far.score("phatgoose", options=one).loss / oracle,
            "far, top 2": far.score("phatgoose").loss / oracle,
            "far, random": far.score(_random(seed), options=one).loss / oracle,
        }


def trained(world: World) -> World:
    """The same world; its adapters have gates now, each trained on its own task alone."""
    for task, adapter in enumerate(world.folders):
        data = [world.batch(task) for _ in range(_STEPS)]
        train_gates(world.model(), adapter, data, steps=_STEPS, loss=_error)
    return world


def _error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x_TD, want_TO = batch
    return (model["map"](x_TD) - want_TO).square().mean()  # pyrefly: ignore[bad-index]


def _random(seed: int) -> Callable[[Site], nn.Module]:
    def build(site: Site) -> nn.Module:
        chance = torch.Generator().manual_seed(seed)
        return PHATGOOSE(site.width, len(site.names), std=1.0, generator=chance, **site.options)

    return build
