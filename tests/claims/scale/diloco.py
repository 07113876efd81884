"""DiLoCo's outer momentum is left out: its first arm is the off arm."""

import torch
from broken import Case

from turnout.train.local import DiLoCo


def plain(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


CASE = Case(
    lambda m: m.setitem(DiLoCo.__init__.__kwdefaults__, "outer", plain),
    pairs={"diloco": "mean"},
    small={"_STEPS": 40},
)
