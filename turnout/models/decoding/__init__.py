"""Decoding: one token after another for the rows of a batch, each row of its own length."""

from turnout.models.decoding.contrasted import Contrasted
from turnout.models.decoding.decoder import Decoder
from turnout.models.decoding.path import decoding_path

__all__ = ["Contrasted", "Decoder", "decoding_path"]
