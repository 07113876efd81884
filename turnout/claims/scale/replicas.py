"""Replicas in one process, for the claims on training that seldom talks: a network of digits, a shard of data each."""

import contextlib
import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.claims.digits import CLASSES, SIDE, digits

__all__ = ["Fleet"]

_WIDTH, _SHARD, _HELD_OUT, _LOOKS = 64, 3000, 4000, 4
Optimizers = list[torch.optim.Optimizer]


class Fleet:
    """One seed's data and start: a shard a replica, in which some classes are commoner than others.

    Source: none; it is what the claims train.
    """

    def __init__(self, seed: int, replicas: int) -> None:
        chance = torch.Generator().manual_seed(seed)
        self.seed, self.replicas = seed, replicas
        self.shards = [_drawn(_SHARD, chance, favoured=at) for at in range(replicas)]
        self.held_out = _drawn(_HELD_OUT, chance)

    def models(self) -> list[nn.Module]:
        """One network a replica, all alike."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            first = nn.Sequential(
                nn.Linear(SIDE * SIDE, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU(),
                nn.Linear(_WIDTH, CLASSES),
            )  # fmt: skip
        return [first, *(copy.deepcopy(first) for _ in range(self.replicas - 1))]

    def train(
        self,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        met: Callable[[Sequence[nn.Module], Optimizers], contextlib.AbstractContextManager[object]],
        *,
        steps: int,
        batch: int,
        together: bool = False,
    ) -> tuple[list[nn.Module], object]:
        """Steps of all replicas in a context; ``together`` gives each the mean of all gradients: data parallelism."""
        models = self.models()
        inner = [optimizer(one) for one in models]
        chance = [torch.Generator().manual_seed(1000 * self.seed + at) for at in range(self.replicas)]
        with met(models, inner) as context:
            for _ in range(steps):
                for one, (x, label), own in zip(models, self.shards, chance, strict=True):
                    pick_B = torch.randint(len(x), (batch,), generator=own)
                    one.zero_grad()
                    F.cross_entropy(one(x[pick_B]), label[pick_B]).backward()
                if together:
                    _averaged(models)
                for each in inner:
                    each.step()
        return models, context

    @torch.no_grad()
    def loss(self, models: Sequence[nn.Module]) -> float:
        """Held-out nats of the replicas' mean."""
        mean = copy.deepcopy(models[0])
        for parts in zip(mean.parameters(), *(one.parameters() for one in models), strict=True):
            parts[0].copy_(torch.stack(list(parts[1:])).mean(0))
        return float(F.cross_entropy(mean(self.held_out[0]), self.held_out[1]))


def _drawn(count: int, chance: torch.Generator, favoured: int | None = None) -> tuple[Tensor, Tensor]:
    label_B = torch.randint(CLASSES, (count,), generator=chance)
    if favoured is not None:  # half of a shard are of two or three classes
        few_B = (favoured * 3 + torch.randint(3, (count,), generator=chance)) % CLASSES
        label_B = torch.where(torch.rand(count, generator=chance) < 0.5, few_B, label_B)
    look_B = torch.randint(_LOOKS, (count,), generator=chance)
    return digits(label_B, look_B, chance), label_B


@torch.no_grad()
def _averaged(models: Sequence[nn.Module]) -> None:
    for parts in zip(*(one.parameters() for one in models), strict=True):
        grads = [one.grad for one in parts if one.grad is not None]
        mean = torch.stack(grads).mean(0)
        for grad in grads:
            grad.copy_(mean)
