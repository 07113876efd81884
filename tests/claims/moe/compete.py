"""Those with the weakest outputs win."""

from broken import Case

from turnout.decide.token import compete

largest = compete.largest
CASE = Case(lambda m: m.setattr(compete, "largest", lambda s, k: largest(-s, k)), "lost")
