"""Serving: requests of many users answered from one model, each as it would be alone."""

from turnout.serve.engine import Engine, Request

__all__ = ["Engine", "Request"]
