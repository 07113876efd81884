"""Balance losses of layers that lie in several stages, each a part of the whole micro-batch's."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.models.stages import LMStage
from turnout.train.balance import Whole, demand, load_balance_loss, router_z_loss, score_sum
from turnout.train.team import Weights
from turnout.types import Routing

__all__ = ["Sides"]


class Sides:
    """What the routed layers of this process's stages add to the objective, and what they are counted by.

    Args:
        stages: this process's, by their number; each gets a ``side``.

    Attributes:
        known: whether it is known which layers there are, in all stages.
        mine: which of all routed layers are this process's.
        scored: how many of all layers give scores.
        logged: how many give logits.

    Source: Fedus et al., 2021, "Switch Transformers", and Zoph et al., 2022, "ST-MoE", for the losses.
    """

    def __init__(self, stages: Mapping[int, LMStage]) -> None:
        self._stages = dict(stages)
        self.known, self.mine, self.scored, self.logged = False, list[int](), 0, 0
        self._first: dict[int, int] = {}  # stage -> its first routed layer's place among all
        self._experts_L: list[int] = []
        self.count()
        for number, stage in self._stages.items():
            stage.side = functools.partial(self._side, number)

    # ---- which layers there are

    def kinds(self) -> dict[str, list[list[int]]]:
        """Of each of this process's stages the layers that were counted: how many experts, and what their routers give.

        Plain JSON.
        """
        found: dict[str, list[list[int]]] = {str(number): [] for number in self._stages}
        for (number, _), sums in sorted(self._sums.items()):
            scored, logged = int(sums.score_E is not None), int(sums.z is not None)
            found[str(number)].append([len(sums.chosen_E), scored, logged])
        return found

    def learn(self, said: Sequence[Mapping[str, Any]]) -> None:
        """Takes in what all processes said, those that share a stage the same."""
        stages = {int(number): layers for one in said for number, layers in one.items()}
        for number in sorted(stages):
            self._first[number] = len(self._experts_L)
            if number in self._stages:
                self.mine += range(len(self._experts_L), len(self._experts_L) + len(stages[number]))
            for experts, scored, logged in stages[number]:
                self._experts_L.append(experts)
                self.scored, self.logged = self.scored + scored, self.logged + logged
        self.known = True

    # ---- a micro-batch

    def count(self) -> None:
        """What comes next is only counted."""
        self._sums: dict[tuple[int, int], _Sums] = {}
        self._weights: Weights | None = None
        self._tokens = 0
        self._wholes: Sequence[Tensor] | None = None

    def begin(self, weights: Weights, tokens: int, wholes: Sequence[Tensor] | None) -> None:
        """What comes next is trained.

        Args:
            weights: of the losses.
            tokens: of the whole micro-batch, that are no padding.
            wholes: of each of all layers, how many of them chose each expert; None where the load-balance loss has no
                gradient.
        """
        self.count()
        self._weights, self._tokens, self._wholes = weights, tokens, wholes

    def _side(self, number: int, routings: Sequence[Routing]) -> Tensor | None:
        """This part's share of both losses, weighted, of one stage; None where they have no gradient."""
        weights, terms = self._weights, []
        for layer, routing in enumerate(routings):
            if routing.penalty is not None:
                got, allowed = "one that asks for a penalty to be minimised", "ask for balance alone in a pipeline"
                raise UsageError(
                    word("a router", got=got, allowed=allowed, where="turnout.train", fix="train with pp=1")
                )
            sums = self._sums.setdefault((number, layer), _Sums())
            at = self._first[number] + layer if self.known else 0
            counted = torch.as_tensor(self._tokens, device=routing.load_E.device)
            with torch.no_grad():
                sums.add(routing, counted)
            if weights is None or not torch.is_grad_enabled():
                continue
            if weights.aux > 0 and routing.score_TE is not None and self._wholes is not None:
                share = load_balance_loss(routing, whole=Whole(self._wholes[at], counted))
                terms.append(weights.aux / (self.scored * weights.accumulate) * share)
            if weights.z > 0 and routing.logit_TE is not None:
                share = router_z_loss(routing, whole=Whole(routing.load_E, counted))
                terms.append(weights.z / (self.logged * weights.accumulate) * share)
        return torch.stack(terms).sum() if terms else None

    @torch.no_grad()
    def demands(self) -> list[Tensor]:
        """Of each of all layers, how many tokens of all processes chose each expert."""
        device = next((sums.chosen_E.device for sums in self._sums.values()), None) or self._device()
        flat = torch.zeros(sum(self._experts_L), dtype=torch.int64, device=device)
        found = list(flat.split(self._experts_L)) if self._experts_L else []
        for (number, layer), sums in self._sums.items():
            found[self._first[number] + layer] += sums.chosen_E
        if found:
            dist.all_reduce(flat)
        return found

    def _device(self) -> torch.device:
        return next(iter(self._stages.values())).like.device

    @torch.no_grad()
    def values(self, wanted: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """This process's part of the load-balance loss and of the z-loss, unweighted, as the step has them.

        Args:
            wanted: what ``demands`` gave.
        """
        assert self._weights is not None
        aux = z = torch.zeros((), device=self._device())
        for (number, layer), sums in self._sums.items():
            chosen_E = wanted[self._first[number] + layer].to(torch.float32)
            if sums.score_E is not None:
                mean_E = sums.score_E / max(1, self._tokens)
                aux = aux + len(chosen_E) * (chosen_E / chosen_E.sum().clamp_min(1) * mean_E).sum()
            if sums.z is not None:
                z = z + sums.z
        parts = self._weights.accumulate
        return aux / (max(1, self.scored) * parts), z / (max(1, self.logged) * parts)


class _Sums:
    """What one layer's routings add up to, over the parts of a micro-batch."""

    def __init__(self) -> None:
        self.chosen_E = torch.zeros((), dtype=torch.int64)
        self.score_E: Tensor | None = None
        self.z: Tensor | None = None

    def add(self, routing: Routing, tokens: Tensor) -> None:
        """One part more, of so many tokens in all."""
        wanted_E = demand(routing)
        self.chosen_E = self.chosen_E.to(wanted_E.device) + wanted_E
        if routing.score_TE is not None:
            score_E = score_sum(routing)
            self.score_E = score_E if self.score_E is None else self.score_E + score_E
        if routing.logit_TE is not None:
            z = router_z_loss(routing, whole=Whole(wanted_E, tokens))
            self.z = z if self.z is None else self.z + z
