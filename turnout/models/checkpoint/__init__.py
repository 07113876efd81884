"""Models on disk: our own folder format, and the folders of transformers, in and out. Only safetensors and json."""

from turnout.models.checkpoint.huggingface import from_hf, to_hf
from turnout.models.checkpoint.own import load, save
from turnout.models.checkpoint.peek import Peek, peek

__all__ = ["Peek", "from_hf", "load", "peek", "save", "to_hf"]
