"""Nobody chooses an expert that computes nothing."""

from broken import Case

from turnout.decide.token import moe_plus_plus

softmax = moe_plus_plus.softmax


def of_the_others(logit_TE):
    masked_TE = logit_TE.clone()
    masked_TE[:, 16:] = -1e9
    return softmax(masked_TE)


CASE = Case(
    lambda m: m.setattr(moe_plus_plus, "softmax", of_the_others), pairs={"run": "run, vanilla"}, small={"_STEPS": 80}
)
