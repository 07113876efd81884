"""One stage a device, which begins with more forwards than 1F1B."""

import importlib

from broken import Case

CASE = Case(lambda m: m.setattr(importlib.import_module("turnout.claims.scale.interleaved"), "_CHUNKS", 1), "near")
