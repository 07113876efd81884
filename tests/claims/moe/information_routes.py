"""Nothing is asked of the router."""

import dataclasses

from broken import Case

from turnout.decide.token import CIGT

forward = CIGT.forward


def unasked(self, x_TD, **more):
    return dataclasses.replace(forward(self, x_TD, **more), penalty=None)


CASE = Case(lambda m: m.setattr(CIGT, "forward", unasked), small={"_STEPS": 60})
