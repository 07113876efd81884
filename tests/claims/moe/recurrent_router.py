"""What is handed on is forgotten."""

import torch
from broken import Case

from turnout.decide.token import RMoE

cell = RMoE._cell


def forgets(self, z_TP, before_TP):
    return cell(self, z_TP, torch.zeros_like(before_TP))


CASE = Case(lambda m: m.setattr(RMoE, "_cell", forgets), small={"_STEPS": 6})
