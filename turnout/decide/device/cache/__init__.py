"""Policies of a cache of experts: what gives up its slot, and what is fetched before it is asked for."""

from turnout.decide.device.cache.history import History, Worth
from turnout.decide.device.cache.least_stale import LeastStale
from turnout.decide.device.cache.lfru import LFRU
from turnout.decide.device.cache.lfu import LFU
from turnout.decide.device.cache.lru import LRU
from turnout.decide.device.cache.pre_gated import PreGated
from turnout.decide.device.cache.static import Static

__all__ = ["LFRU", "LFU", "LRU", "History", "LeastStale", "PreGated", "Static", "Worth"]
