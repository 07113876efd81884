"""One stage a device."""

import importlib

from broken import Case

CASE = Case(lambda m: m.setattr(importlib.import_module("turnout.claims.scale.interleaved"), "_CHUNKS", 1))
