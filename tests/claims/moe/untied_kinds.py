"""All kinds are the first."""

import torch
from broken import Case

from turnout.decide.token import ByKind
from turnout.types import Given

need = Given.need


def first(self, name, where):
    found = need(self, name, where)
    return torch.zeros_like(found) if name == "kind_T" else found


def breaks(m):
    assert ByKind.needs_given
    m.setattr(Given, "need", first)


CASE = Case(breaks, "near", small={"_STEPS": 20})
