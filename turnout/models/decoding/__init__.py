"""Decoding: one token after another for the rows of a batch, each row of its own length."""

from turnout.models.decoding.decoder import Decoder

__all__ = ["Decoder"]
