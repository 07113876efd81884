"""The engine under the server: requests in, tokens out, in the threads of its caller and one of its own."""

from turnout.serve.engine.engine import Engine
from turnout.serve.engine.request import EngineStats, Finished, QueueFull, Request, Token, TokenMask
from turnout.serve.engine.ticket import Ticket

__all__ = ["Engine", "EngineStats", "Finished", "QueueFull", "Request", "Ticket", "Token", "TokenMask"]
