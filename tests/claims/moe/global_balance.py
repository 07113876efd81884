"""Each micro-batch is balanced for itself, whatever the whole is."""

import importlib

from broken import Case

room = importlib.import_module("turnout.claims.moe.global_balance")
loss = room.load_balance_loss
CASE = Case(
    lambda m: m.setattr(room, "load_balance_loss", lambda routing, whole=None: loss(routing)), small={"_STEPS": 40}
)
