"""Serving: requests of many users answered from one model, each as it would be alone."""

from turnout.serve.engine import Engine, EngineStats, Finished, QueueFull, Request, Ticket, Token, TokenMask

__all__ = ["Engine", "EngineStats", "Finished", "QueueFull", "Request", "Ticket", "Token", "TokenMask"]
