"""A cache of experts on a recorded trace: what each policy fetches and waits for, beside a bound on all."""

from turnout.measure.cache.replay import Replay, Timing, replay, replays
from turnout.measure.cache.report import Contender, cache_report

__all__ = ["Contender", "Replay", "Timing", "cache_report", "replay", "replays"]
