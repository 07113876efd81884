"""The plan is the logits themselves."""

from broken import Case

from turnout.decide.token import sinkhorn_router

CASE = Case(lambda m: m.setattr(sinkhorn_router, "sinkhorn", lambda logit_TE, **_: logit_TE), small={"_STEPS": 60})
