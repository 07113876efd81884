"""The routers do not learn."""

from broken import Case

from turnout.decide.token import PatchChoice

logits = PatchChoice.logits
CASE = Case(lambda m: m.setattr(PatchChoice, "logits", lambda self, x_TD: logits(self, x_TD).detach()), "lost")
