"""Nobody is sent to an expert of its device."""

from broken import Case

from turnout.decide.token import Rectify

made = Rectify.__init__


def without(self, *arguments, **keywords):
    made(self, *arguments, **keywords)
    self.intra_device = False


CASE = Case(
    lambda m: m.setattr(Rectify, "__init__", without),
    pairs={"intra-device": "dropped"},
    small={"_STEPS": 10},
    taught=30,
)
