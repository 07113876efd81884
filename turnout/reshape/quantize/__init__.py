"""Weights in few bits: rounded to nearest, or with their errors made good on text; what the codes stand for."""

from turnout.reshape.quantize.quantize import quantize

__all__ = ["quantize"]
