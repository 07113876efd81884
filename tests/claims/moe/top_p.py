"""Nothing is asked for."""

import dataclasses

from broken import Case

from turnout.decide.token import TopP

forward = TopP.forward


def unasked(self, x_TD, **more):
    return dataclasses.replace(forward(self, x_TD, **more), penalty=None)


CASE = Case(lambda m: m.setattr(TopP, "forward", unasked), pairs={"experts": "experts, none"}, small={"_STEPS": 200})
