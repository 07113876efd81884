"""The shared map does not learn."""

from broken import Case

from turnout.paths import FactoredBank

made = FactoredBank.__init__


def frozen(self, *arguments, **keywords):
    made(self, *arguments, **keywords)
    self.up_in.requires_grad_(False)


CASE = Case(lambda m: m.setattr(FactoredBank, "__init__", frozen), small={"_STEPS": 40})
