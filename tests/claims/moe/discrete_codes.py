"""Nothing is asked of the codes."""

import dataclasses

from broken import Case

from turnout.decide.token import VQ

forward = VQ.forward


def unasked(self, x_TD, **more):
    return dataclasses.replace(forward(self, x_TD, **more), penalty=None)


CASE = Case(lambda m: m.setattr(VQ, "forward", unasked), small={"_STEPS": 60})
