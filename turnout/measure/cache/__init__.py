"""A cache of experts on a recorded trace: what each policy fetches and waits for, beside what no policy can do without."""

from turnout.measure.cache.replay import Replay, Timing, replay, replays

__all__ = ["Replay", "Timing", "replay", "replays"]
