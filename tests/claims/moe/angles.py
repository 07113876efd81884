"""Vectors keep their lengths."""

from broken import Case

from turnout.decide.token import xmoe


class Plain:
    """``torch.nn`` whose vectors are what they are."""

    def __getattr__(self, name):
        return getattr(nn, name)

    class functional:  # as torch spells it
        @staticmethod
        def normalize(x, dim):
            return x


nn = xmoe.nn
CASE = Case(lambda m: m.setattr(xmoe, "nn", Plain()), "lost", {"changed": "changed, linear"}, {"_STEPS": 60})
