"""Units of one microbatch."""

import importlib

from broken import Case

CASE = Case(lambda m: m.setattr(importlib.import_module("turnout.claims.scale.zeropp"), "_UNIT", 1))
