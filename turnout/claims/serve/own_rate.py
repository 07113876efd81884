"""A route predictor switched off: what a text has used of late, and nothing learnt."""

import numpy as np

from turnout.decide.device.cache import ExpertFlow
from turnout.decide.device.cache.route_predictor import RoutePredictor

__all__ = ["own_rate"]


class _OwnRate(RoutePredictor):
    """The rate at which this text has used each expert is its chance."""

    def paths(self, before_P: np.ndarray, rate_P: np.ndarray, token: int = -1) -> np.ndarray:
        return rate_P.reshape(len(self.uses_L), -1)


def own_rate(predictor: RoutePredictor) -> ExpertFlow:
    """ExpertFlow without its predictor and without correction: the same cache, by a text's own rates."""
    return ExpertFlow(_OwnRate(**vars(predictor)), correct=False)
