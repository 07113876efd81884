"""Tuning: what the executors of a machine choose by, as it was measured there."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch

from turnout.errors import UsageError, word
from turnout.fields import build, plain

__all__ = ["Tuning"]

_WHERE = "turnout.types.Tuning"
_COSTS = 4
_ABOUT = ("processor", "torch", "threads", "origin")
# What tunings had no word for at first: at its usual value it changes nothing, the digest neither.
_LATER = ("compiled_rows", "packed_rows", "panel_rows", "panel_rows_short", "tiled_rows", "tiled_rows_short")


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What the executors choose by on one machine: which kernels, how rows are rounded and grouped, what costs what.

    Every number decides about speed alone, but which kernel sums decides about the last bits: the same tuning on the
    same machine gives the same bits.

    Args:
        processor: for which it holds, in words.
        torch: the version that it was measured with.
        threads: of torch.
        origin: "measured" on this machine; "shipped" with turnout for its kind of processor; "assumed", a rule.
        onednn: multiply-adds from which an fp32 product goes to oneDNN in place of torch's BLAS; None for never.
        onednn_turned: likewise where the first factor lies transposed, as in gradients of weights.
        group: numbers per intermediate tensor of a group of experts that is worked through at once.
        steps: row counts that oneDNN compiles kernels for are rounded up to this part of themselves or of the mean.
        steps_near: in 16 bits and near the mean load, where most rows are, to this part.
        call: multiply-adds that cost as much as one call of a 16-bit product: neighbours share a call below that.
        decode_tokens: without gradients, up to this many tokens read each chosen expert's weights row by row.
        decode_rows: and up to this many rows for each expert.
        compiled_rows: where kernels can be compiled, up to this many rows for each expert, and 64 tokens, use those
            that read every weight once.
        packed_rows: up to this many rows for each expert, experts in few bits are read as they lie, and else written
            out first.
        panel_rows: likewise where more rows make only as many weights as the cache holds be written out at a time.
        panel_rows_short: likewise in 16 bits.
        tiled_rows: up to this many rows for each expert, products in fp32 are turnout's own, and else torch's.
        tiled_rows_short: likewise in 16 bits.
        seconds: by "device dtype pass" and executor, what a call, an expert, a multiply-add and a moved number cost.

    Raises:
        UsageError: a number that cannot be.

    >>> Tuning("a processor", "2.13", 1).onednn is None
    True

    Source: none; measured by ``turnout.run.calibrate``.
    """

    processor: str
    torch: str
    threads: int
    origin: Literal["measured", "shipped", "assumed"] = "assumed"
    onednn: int | None = None
    onednn_turned: int | None = None
    group: int = 1 << 17
    steps: int = 16
    steps_near: int = 32
    call: int = 3_000_000
    decode_tokens: int = 16
    decode_rows: int = 4
    compiled_rows: int = 8
    packed_rows: int = 32
    panel_rows: int = 16
    panel_rows_short: int = 12
    tiled_rows: int = 0
    tiled_rows_short: int = 0
    seconds: Mapping[str, Mapping[str, tuple[float, ...]]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("threads", "group", "steps", "steps_near"):
            self._refuse(name, getattr(self, name) >= 1, "be 1 or more")
        for name in ("onednn", "onednn_turned", "call", "decode_tokens", "decode_rows", *_LATER):
            self._refuse(name, (getattr(self, name) or 0) >= 0, "be 0 or more")
        for situation, costs in self.seconds.items():
            whole = "sort" in costs and all(len(each) == _COSTS for each in costs.values())
            sound = whole and all(math.isfinite(one) and one >= 0 for each in costs.values() for one in each)
            self._refuse(f"seconds of {situation!r}", sound, f"be {_COSTS} numbers of 0 or more for sort and others")

    def _refuse(self, name: str, sound: bool, allowed: str) -> None:
        if not sound:
            got = self.seconds if name.startswith("seconds") else getattr(self, name)
            raise UsageError(word(name, got=got, allowed=allowed, where=_WHERE, fix="turnout doctor --calibrate"))

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits: the same for tunings that make the executors choose the same."""
        usual = {one.name: one.default for one in dataclasses.fields(self) if one.name in _LATER}
        values = {name: value for name, value in plain(self).items() if name not in _ABOUT}
        values = {name: value for name, value in values.items() if name not in usual or value != usual[name]}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]

    def code_rows(self, dtype: torch.dtype, *, panels: bool) -> int:
        """Up to how many rows each matrix in few bits is read as it lies, and else written out, in panels or whole."""
        if not panels:
            return self.packed_rows
        return self.panel_rows_short if dtype.itemsize == 2 else self.panel_rows

    def own_rows(self, dtype: torch.dtype) -> int:
        """Up to how many rows for each expert products are turnout's own."""
        return self.tiled_rows_short if dtype.itemsize == 2 else self.tiled_rows

    def __str__(self) -> str:
        return f"{self.origin} for {self.processor}, {self.threads} threads, torch {self.torch} ({self.digest})"

    @classmethod
    def from_json_dict(cls, body: Any) -> Self:
        """As ``to_json_dict`` wrote it.

        Raises:
            TurnoutError: it is not one, or a number cannot be.
        """
        values = (
            {name: value for name, value in body.items() if name != "digest"} if isinstance(body, Mapping) else body
        )
        return build(cls, values, "a tuning")

    def to_json_dict(self) -> dict[str, Any]:
        """As JSON values, with the digest."""
        return {"digest": self.digest, **plain(self)}
