"""Nothing is cut finer."""

from broken import Case

from turnout.models import MoEConfig

CASE = Case(lambda m: m.setattr(MoEConfig, "fine", lambda self, pieces, shared: self), small={"_STEPS": 40})
