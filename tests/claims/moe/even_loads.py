"""The assignment is dealt out by chance."""

import torch
from broken import Case

from turnout.decide.token import balanced


def by_chance(affinity_TE):
    return torch.randperm(len(affinity_TE), generator=torch.Generator().manual_seed(7)) % affinity_TE.shape[1]


CASE = Case(
    lambda m: m.setattr(balanced, "even_assignment", by_chance), "near", {"base": "dealt"}, small={"_STEPS": 60}
)
