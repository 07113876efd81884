"""There is one group."""

from broken import Case

from turnout.decide.token import SAM

made = SAM.__init__


def of_one(self, *arguments, **keywords):
    made(self, *arguments, **{**keywords, "num_groups": 1})


CASE = Case(lambda m: m.setattr(SAM, "__init__", of_one), "near", {"groups": "groups, anywhere"}, small={"_STEPS": 40})
