"""Prompts are compared by noise: the neighbours that the gradient is of are any."""

import sys

import torch
from broken import Case


def noise(lm, prompts, encoder):
    return torch.randn(len(prompts), 32, generator=torch.Generator().manual_seed(len(prompts)))


CASE = Case(
    lambda m: m.setattr(sys.modules["turnout.models.c3po.c3po"], "embedded", noise),
    "lost",
    pairs={"gradient": "gradient, random"},
    small={"_TESTS": 96, "_KNOWN": 200},
)
