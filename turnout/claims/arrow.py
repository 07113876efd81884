"""Claim: an adapter's own weights tell which tokens it is for, without any data."""

import tempfile
from collections.abc import Callable

import torch
from torch import nn

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.subspaces import OUT, RANK, TASKS, WIDTH, World
from turnout.decide.token import Arrow
from turnout.reshape.adapters.routers import Site


def arrow() -> Claim:
    """Routed by the first right singular vector of each B A, four adapters lose less than their mean does.

    Nothing is trained and no data are seen. The controls are random directions, and the mean of all adapters.

    >>> arrow().off
    'random directions'

    Source: Ostapenko et al., 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs".
    """
    metric, mean = "squared error over that of each token's own adapter", "the mean of all adapters"
    return Claim(
        name="arrow",
        statement="The first singular direction of an adapter's weights says, without any data, which tokens are its.",
        source="Ostapenko et al., 2024, Arrow",
        off="random directions",
        switched={"all": "random", "wrong": "chance"},
        rows=(
            Row(metric, "below", "all", "random", "random directions"),
            Row("share of tokens sent elsewhere", "below", "wrong", "chance", "random directions"),
            Row(f"{metric}, all weighted", "below", "all", "mean", mean, headline=True),
            Row(f"{metric}, top 1", "below", "one", "mean", mean, headline=True),
        ),
        measure=_measure,
        seconds=1,
        note=f"{TASKS} tasks on disjoint subspaces of width {WIDTH}, a linear map to {OUT}, adapters of rank {RANK}; "
        "all of them weighted, at temperature 1, or the first alone. The paper takes 4 of 256",
        limits=(0.0, 50.0),
    )


def _measure(seed: int) -> Values:
    with tempfile.TemporaryDirectory(prefix="turnout-claim-") as folder:
        world = World(seed, folder)
        oracle = world.oracle()
        exact = world.score("arrow", options={"top_k": TASKS})
        random = world.score(_random(seed))
        return {
            "all": exact.loss / oracle,
            "random": random.loss / oracle,
            "mean": world.score("even").loss / oracle,
            "one": world.score("arrow", options={"top_k": 1}).loss / oracle,
            "wrong": exact.wrong,
            "chance": random.wrong,
        }


def _random(seed: int) -> Callable[[Site], nn.Module]:
    def build(site: Site) -> nn.Module:
        router = Arrow(site.width, len(site.names), top_k=TASKS)
        chance = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            router.weight.copy_(nn.functional.normalize(router.weight.normal_(generator=chance), dim=1))
        return router

    return build
