"""Claim: what a request asks for decides where tokens cannot, and leaves the choice to them elsewhere."""

import dataclasses
import statistics
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.phatgoose import trained
from turnout.claims.subspaces import TASKS, WIDTH, World
from turnout.layers import given
from turnout.reshape import attach

_QUERY, _SEQUENCES, _TOKENS = 384, 64, 32
_UNSEEN = ((0, 2), (0, 3), (1, 2), (1, 3))
# What Glider is compared with: (router, its options).
_ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "glider": ("glider", {}),
    "local": ("phatgoose", {}),
    "always": ("glider", {"threshold": -1.0}),
    "never": ("glider", {"threshold": 1.0}),
}


def glider() -> Claim:
    """Requests tell apart tasks of the same tokens; on sequences of two tasks Glider is no worse than PHATGOOSE.

    Two pairs of tasks: those of a pair have the same tokens and want other maps. A request is the description of its
    task and noise. Unseen tasks have sequences of tokens from both pairs; their request lies between two descriptions
    ("known words"), or anywhere ("other words").

    >>> glider().off
    'the tokens alone (PHATGOOSE)'

    Source: Li et al., 2025, "Glider: Global and Local Instruction-Driven Expert Router".
    """
    held, alone = "held-in: squared error over the oracle's", "the tokens alone (PHATGOOSE)"
    known, other = "unseen, asked for in known words: the same", "unseen, asked for in other words: the same"
    never, always = "gamma for no request", "gamma for every request"
    why = "a tenth of what the right request saves"
    return Claim(
        name="glider",
        statement="The request settles what tokens cannot on held-in tasks; unseen tasks do not lose by it.",
        source="Li et al., 2025, Glider",
        off=alone,
        switched={"glider held": "local held", "glider unseen": "local unseen"},
        rows=(
            Row(held, "below", "glider held", "local held", alone),
            Row(known, "below", "glider unseen", "local unseen", alone),
            Row(held, "below", "glider held", "never held", never, headline=True),
            Row(other, "no_worse", "glider strange", "local strange", alone, margin=0.7, why=why, headline=True),
            Row(other, "below", "glider strange", "always strange", always, headline=True),
            Row(known, "below", "glider unseen", "always unseen", always, headline=True),
        ),
        measure=_measure,
        seconds=2,
        note=f"{TASKS} tasks in two pairs, width {WIDTH}; vectors of {_QUERY} in the place of an encoder's, "
        "descriptions 0.35 alike, requests 0.82 to 0.98 like their own",
        limits=(0.0, 100.0),
    )


def _measure(seed: int) -> Values:
    with tempfile.TemporaryDirectory(prefix="turnout-claim-") as folder:
        world = trained(World(seed, folder, distance=4.0, twins=True))
        asked = _Asked(world, torch.Generator().manual_seed(seed))
        return {f"{arm} {name}": value for arm in _ARMS for name, value in asked.score(arm).items()}


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The tasks of a world with descriptions, and requests for them."""

    world: World
    chance: torch.Generator

    def score(self, arm: str) -> dict[str, float]:
        """Squared error over that of the right adapters, on held-in and unseen tasks."""
        self.chance.manual_seed(self.chance.initial_seed())
        description_ZQ = self._descriptions()
        model, (router, options) = self.world.model(), _ARMS[arm]
        if router == "glider":
            names = [folder.name for folder in self.world.folders]
            options = options | {"embeddings": dict(zip(names, description_ZQ, strict=True))}
        attach(model, self.world.folders, router=router, router_options=options)
        oracle = self.world.oracle()
        held = [((z,), description_ZQ[z]) for z in range(TASKS)]
        unseen = [(pair, nn.functional.normalize(description_ZQ[list(pair)].sum(0), dim=0)) for pair in _UNSEEN]
        strange = [(pair, torch.zeros(_QUERY)) for pair in _UNSEEN]
        sets = {"held": held, "unseen": unseen, "strange": strange}
        return {
            name: statistics.fmean(self._error(model, tasks, about_Q) for tasks, about_Q in some) / oracle
            for name, some in sets.items()
        }

    def _descriptions(self) -> Tensor:
        own_ZQ = nn.functional.normalize(torch.randn(TASKS, _QUERY, generator=self.chance), dim=1)
        shared_Q = nn.functional.normalize(torch.randn(_QUERY, generator=self.chance), dim=0)
        return nn.functional.normalize(0.65**0.5 * own_ZQ + 0.35**0.5 * shared_Q, dim=1)

    @torch.no_grad()
    def _error(self, model: nn.Module, tasks: tuple[int, ...], about_Q: Tensor) -> float:
        """On sequences whose tokens come from these tasks in turn, asked for by what lies about this vector."""
        rows = _SEQUENCES * _TOKENS // len(tasks)
        drawn = [self.world.batch(task, rows) for task in tasks]
        x_TD, want_TO = (torch.stack(parts, 1).flatten(0, 1) for parts in zip(*drawn, strict=True))
        noise_BQ = nn.functional.normalize(torch.randn(_SEQUENCES, _QUERY, generator=self.chance), dim=1)
        length_B1 = torch.empty(_SEQUENCES, 1).uniform_(0.2, 0.7, generator=self.chance)
        with given(query_BQ=about_Q + length_B1 * noise_BQ):
            y_BSO = model["map"](x_TD.view(_SEQUENCES, _TOKENS, -1))  # pyrefly: ignore[bad-index]
        return (y_BSO.flatten(0, 1) - want_TO).square().mean().item()
