"""How many experts a number of bytes holds: what ``--expert-memory 2GB`` means for a model."""

from turnout.errors import UsageError, word
from turnout.fields import byte_size
from turnout.types import CacheShape

__all__ = ["expert_slots"]

_WHERE = "turnout.decide.device.expert_slots"


def expert_slots(
    size: int | str, *, expert_bytes: int, layers: int, experts: int, top_k: int, shared: bool = False
) -> CacheShape:
    """The slots that so much memory holds, as many for each layer; no more than there are experts.

    Args:
        size: as ``turnout.fields.byte_size``.
        expert_bytes: of one expert.
        layers: those that have experts.
        experts: of each layer.
        top_k: how many of them a token takes.
        shared: whether all layers share them. They do where there are fewer than top_k for each.

    Raises:
        UsageError: no size, or room for fewer experts than a token takes of one layer.

    >>> expert_slots("1MB", expert_bytes=100_000, layers=2, experts=8, top_k=2)
    CacheShape(layers=2, experts=8, slots=5, shared=False)

    Source: none; plain bookkeeping.
    """
    most = byte_size(size, what="expert_memory", where=_WHERE)
    slots = most // expert_bytes
    if slots < top_k:
        got = f"{size}, {most:,} bytes, room for {slots} experts of {expert_bytes:,} bytes"
        allowed = f"hold the {top_k} experts that a token takes of one layer, {top_k * expert_bytes:,} bytes"
        fix = f"pass expert_memory={top_k * expert_bytes} or more; {layers * experts * expert_bytes} hold all experts"
        raise UsageError(word("expert_memory", got=got, allowed=allowed, where=_WHERE, fix=fix))
    if not shared and slots // layers >= top_k:
        return CacheShape(layers, experts, min(slots // layers, experts))
    return CacheShape(layers, experts, min(slots, layers * experts), shared=True)
