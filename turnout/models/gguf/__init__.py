"""Models as GGUF, the file of llama.cpp."""

from turnout.models.gguf.write import GGUFFile, to_gguf

__all__ = ["GGUFFile", "to_gguf"]
