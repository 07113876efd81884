"""Each task has the skills of another one."""

from broken import Case

from turnout.decide.token import Skills

forward = Skills.forward


def of_another(self, x_TD, *, given, **more):
    table_NE = self.table_NE
    self.table_NE = table_NE.roll(3, 0)
    try:
        return forward(self, x_TD, given=given, **more)
    finally:
        self.table_NE = table_NE


CASE = Case(lambda m: m.setattr(Skills, "forward", of_another), "lost", small={"_STEPS": 150})
