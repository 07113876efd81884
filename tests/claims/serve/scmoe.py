"""The weak scores are always those of another place, so that nothing of the text's own is contrasted."""

import torch
from broken import Case

from turnout.models import Contrast

scores = Contrast.scores


def elsewhere(self, strong_TV, weak_TV):
    order_T = torch.randperm(len(weak_TV), generator=torch.Generator().manual_seed(1))
    return scores(self, strong_TV, weak_TV[order_T])


CASE = Case(
    lambda m: m.setattr(Contrast, "scores", elsewhere),
    "lost",
    small={"_SCORED": 2048, "_PLAIN": 1},
    taught=1,
)
