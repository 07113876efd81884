"""The teacher is there and never asked: its student is the untaught one, to the last digit."""

import sys

from broken import Case

CASE = Case(
    lambda m: m.setattr(sys.modules["turnout.train.step"], "taught_until", lambda config: 0),
    pairs={"staged": "untaught"},
    small={"_STEPS": 12},
)
