"""Models on disk: our own folder format, and the folders of transformers, in and out. Only safetensors and json."""

from turnout.models.checkpoint.huggingface import from_hf, to_hf
from turnout.models.checkpoint.live import from_live
from turnout.models.checkpoint.offloaded import load_offloaded
from turnout.models.checkpoint.own import load, save
from turnout.models.checkpoint.peek import Peek, peek
from turnout.models.checkpoint.peft import PeftAdapter, read_adapter, write_adapter, write_gates

__all__ = [
    "Peek",
    "PeftAdapter",
    "from_hf",
    "from_live",
    "load",
    "load_offloaded",
    "peek",
    "read_adapter",
    "save",
    "to_hf",
    "write_adapter",
    "write_gates",
]
