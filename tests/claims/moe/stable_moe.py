"""It never freezes."""

from broken import Case

from turnout.decide.token import StableMoE

CASE = Case(
    lambda m: m.setattr(StableMoE, "frozen", property(lambda self: False)), small={"_STEPS": 200, "_FREEZE": 40}
)
