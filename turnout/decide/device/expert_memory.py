"""How many experts a number of bytes holds: what ``--expert-memory 2GB`` means for a model."""

import re

from turnout.errors import UsageError, word
from turnout.types import CacheShape

__all__ = ["byte_size", "expert_slots"]

_WHERE = "turnout.decide.device.expert_slots"
_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)


def byte_size(size: int | str, *, what: str = "expert_memory", where: str = _WHERE) -> int:
    """The bytes that a size says, as a number or in words: 2GB is 2,000,000,000 and 2GiB 2,147,483,648.

    Args:
        size: bytes, or a number with a unit: kB, MB, GB, TB (thousands) or KiB, MiB, GiB, TiB (of 1024).
        what: the size as the user knows it: ``"--kv-memory"``.
        where: who asks.

    Raises:
        UsageError: no size, or none above 0.

    >>> byte_size("2GB"), byte_size("1.5 GiB"), byte_size(4096)
    (2000000000, 1610612736, 4096)

    Source: IEC 80000-13, for the units.
    """
    fix = f"pass {what} 2GB" if what.startswith("--") else f"pass {what}=2GB"
    found = _SIZE.fullmatch(str(size)) if not isinstance(size, bool) else None
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        allowed = "be bytes, or a number and a unit of kB, MB, GB, TB, KiB, MiB, GiB, TiB"
        raise UsageError(word(what, got=repr(size), allowed=allowed, where=where, fix=fix))
    bytes_ = int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit
    if bytes_ < 1:
        allowed = "be a byte at least"
        raise UsageError(word(what, got=size, allowed=allowed, where=where, fix=f"{fix}, or leave it out"))
    return bytes_


def expert_slots(
    size: int | str, *, expert_bytes: int, layers: int, experts: int, top_k: int, shared: bool = False
) -> CacheShape:
    """The slots that so much memory holds, as many for each layer; no more than there are experts.

    Args:
        size: as ``byte_size``.
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
    most = byte_size(size)
    slots = most // expert_bytes
    if slots < top_k:
        got = f"{size}, {most:,} bytes, room for {slots} experts of {expert_bytes:,} bytes"
        allowed = f"hold the {top_k} experts that a token takes of one layer, {top_k * expert_bytes:,} bytes"
        fix = f"pass expert_memory={top_k * expert_bytes} or more; {layers * experts * expert_bytes} hold all experts"
        raise UsageError(word("expert_memory", got=got, allowed=allowed, where=_WHERE, fix=fix))
    if not shared and slots // layers >= top_k:
        return CacheShape(layers, experts, min(slots // layers, experts))
    return CacheShape(layers, experts, min(slots, layers * experts), shared=True)
