"""Policies of a cache of experts: what gives up its slot, and what is fetched before it is asked for."""

from turnout.decide.device.cache.expert_flow import ExpertFlow
from turnout.decide.device.cache.history import History, Worth
from turnout.decide.device.cache.learnt import Learnt
from turnout.decide.device.cache.least_stale import LeastStale
from turnout.decide.device.cache.lfru import LFRU
from turnout.decide.device.cache.lfu import LFU
from turnout.decide.device.cache.lru import LRU
from turnout.decide.device.cache.named import named_policy
from turnout.decide.device.cache.pre_gated import PreGated
from turnout.decide.device.cache.route_predictor import RoutePredictor, learn_routes
from turnout.decide.device.cache.static import Static
from turnout.decide.device.cache.trace_matching import TraceMatching

__all__ = [
    "LFRU",
    "LFU",
    "LRU",
    "ExpertFlow",
    "History",
    "Learnt",
    "LeastStale",
    "PreGated",
    "RoutePredictor",
    "Static",
    "TraceMatching",
    "Worth",
    "learn_routes",
    "named_policy",
]
