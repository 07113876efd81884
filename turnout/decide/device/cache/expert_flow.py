"""ExpertFlow: the path through all layers is predicted before the pass, and corrected as truth arrives."""

import dataclasses
import functools
from typing import Self

import numpy as np

from turnout.decide.device.cache.history import History, other_text
from turnout.decide.device.cache.route_predictor import RoutePredictor, learn_routes
from turnout.types.accesses import Accesses
from turnout.types.expert_cache import Access, CacheShape, Decision

__all__ = ["ExpertFlow", "Flowing"]


@dataclasses.dataclass(frozen=True, eq=False)
class Flowing:
    """What ExpertFlow remembers.

    Args:
        history: of the cache; uses halve in weight as the predictor's do.
        before_P: what the last pass of this text used.
        now_P: what this pass has used so far.
        chance_LE: (L, E) what is foreseen of this pass.
        sequence: which text it is.
        aside: what is remembered of the texts before, which may come again.
        begun: whether anything of it was read.

    Source: none; plain bookkeeping.
    """

    history: History
    before_P: np.ndarray
    now_P: np.ndarray
    chance_LE: np.ndarray
    sequence: int = -1
    aside: tuple["Flowing", ...] = ()
    begun: bool = False


class ExpertFlow:
    """Holds and fetches what a light predictor foresees of the whole path, corrected by what the gates then choose.

    Before a pass the predictor gives each expert of every layer its chance p. For layers whose turn has passed p is the
    rate at which the text has used the expert. An expert d layers before its turn is worth minus its expected next
    use, d + L (1/p - 1). What is foreseen and likely in the next layers is fetched early. When a layer's gate has
    chosen, what it did not choose counts as passed, and the next layer's chances are shifted by how often its experts
    follow those that were chosen.

    Args:
        predictor: of paths.
        correct: whether chances are corrected within a pass.
        early: how many experts are fetched before their time at each access, at most.
        reach: of how many layers ahead.
        likely: the least chance of what is fetched early.

    >>> told = Accesses.of_paths(np.array([[[0], [1]], [[1], [0]]] * 20), experts=2)
    >>> policy = ExpertFlow(learn_routes(told, seed=0, steps=100))
    >>> policy.update(policy.init(CacheShape(2, 2, 1)), Access(0, (1,), step=0))[1].prefetch
    ((1, 0),)

    Source: He et al., 2024, "ExpertFlow: Optimized Expert Activation and Token Allocation for Efficient
    Mixture-of-Experts Inference". Which tokens run together is ``decide.device.regroup``.
    """

    def __init__(
        self,
        predictor: RoutePredictor,
        *,
        correct: bool = True,
        early: int = 4,
        reach: int = 2,
        likely: float = 0.5,
    ) -> None:
        self.predictor, self.correct = predictor, correct
        self.early, self.reach, self.likely = early, reach, likely

    @classmethod
    def learn(cls, accesses: Accesses, *, seed: int = 0) -> Self:
        """With a predictor that learns from these accesses."""
        return cls(learn_routes(accesses, seed=seed))

    def init(self, sizes: CacheShape) -> Flowing:
        """Nothing is held, no text has begun."""
        return self._begun(History.empty(sizes), -1)

    def _begun(self, history: History, sequence: int) -> Flowing:
        pages = len(history.held_P)
        chance_LE = np.zeros((history.sizes.layers, history.sizes.experts))
        return Flowing(history, np.zeros(pages), np.zeros(pages), chance_LE, sequence)

    def foretell(self, state: Flowing, access: Access) -> tuple[Flowing, np.ndarray, list[int]]:
        """The state after this access, what each expert is worth, and which should come early."""
        sizes, layer, half = state.history.sizes, access.layer, self.predictor.half
        keep = 2.0 ** (-1 / (half * sizes.layers))
        if access.sequence != state.sequence:
            begun = functools.partial(self._begun, state.history, access.sequence)
            state = other_text(state, access.sequence, begun)
        fresh = not state.begun
        history, before_P, now_P, chance_LE = state.history, state.before_P, state.now_P, state.chance_LE
        if fresh or access.step != history.step:
            before_P, now_P = (now_P, np.zeros_like(now_P)) if not fresh else (before_P, now_P)
            rate_P = before_P * 0 if fresh else self._rate(history, keep)
            chance_LE = self.predictor.paths(before_P, rate_P, access.tokens[0] if len(access.tokens) == 1 else -1)
        if self.correct and layer + 1 < sizes.layers:
            chance_LE = chance_LE.copy()
            chance_LE[layer + 1] = self.predictor.corrected(chance_LE[layer + 1], layer, access.experts)
        history = history.touched(access, keep)
        now_P = now_P.copy()
        now_P[history.pages(access)] = 1
        until_P = history.until(layer)
        coming_P = until_P <= sizes.layers - 1 - layer
        chance_P = np.where(coming_P, chance_LE.reshape(-1), self._rate(history, keep)).clip(1e-4, 1)
        worth_P = -(until_P + sizes.layers * (1 / chance_P - 1))
        near_W = np.nonzero(coming_P & (until_P <= self.reach) & (chance_P >= self.likely))[0]
        wish = near_W[np.argsort(-worth_P[near_W], kind="stable")[: self.early]].tolist()
        after = Flowing(history, before_P, now_P, chance_LE, access.sequence, state.aside, begun=True)
        return after, worth_P, wish

    def _rate(self, history: History, keep: float) -> np.ndarray:
        """(P,) how often each is used in a pass, of late."""
        weight_P = history.count_P * keep ** (history.tick - history.last_P)
        return weight_P * (1 - 2.0 ** (-1 / self.predictor.half))

    def update(self, state: Flowing, access: Access) -> tuple[Flowing, Decision]:
        """Fetches what is missing, and early what is likely in the next layers."""
        state, worth_P, wish = self.foretell(state, access)
        history, decision = state.history.served(access, lambda: worth_P, wish)
        return dataclasses.replace(state, history=history), decision
