"""The product of both is left out."""

from broken import Case

from turnout.solve import scaling

free = scaling._free
CASE = Case(lambda m: m.setattr(scaling, "_free", lambda law: free("separable") if law == "saturating" else free(law)))
