"""A load generator for any server of OpenAI's protocol, with little work for the machine that it shares."""

from turnout.serve.load.answer import Answer
from turnout.serve.load.ask import ask
from turnout.serve.load.bench import bench
from turnout.serve.load.exchange import Target
from turnout.serve.load.lengths import LengthMix
from turnout.serve.load.report import LoadPoint, LoadReport, Spread
from turnout.serve.load.slo import Slo
from turnout.serve.load.traffic import Traffic

__all__ = [
    "Answer",
    "LengthMix",
    "LoadPoint",
    "LoadReport",
    "Slo",
    "Spread",
    "Target",
    "Traffic",
    "ask",
    "bench",
]
