"""Numbers in fewer bytes and not a bit lost: bytes of a kind together."""

from turnout.models.zipnn.planes import decode, encode

__all__ = ["decode", "encode"]
