"""Tells rounding that takes another expert from a leak: what a wider dtype does not show is rounding."""

import copy
import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from turnout.measure.isolation.finding import Finding
from turnout.measure.isolation.seen import SAME_KERNEL
from turnout.measure.isolation.subject import Layer, Model
from turnout.measure.memory import free_on

__all__ = ["Rounding"]

_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
# What float32 may still differ by, as where the network itself is audited in it.
_LEFT = 1e-4
# Other rows, with which a victim's are compared: drawn alike, so that it is past all of them once in so many audits.
_ROWS, _EACH = 256, 8

Probe = Callable[[Layer | Model, torch.Generator, int, float], Finding]


class Rounding:
    """How far rounding alone takes a network, and whether that is all that a probe found.

    A tie between experts that rounding turns moves an output by as much as the experts differ, which no fixed bound
    knows. Two things do: the same probe in float32, where such ties are a thousandth as many and whatever the
    network does on purpose is as large; and 256 other rows in both dtypes. A finding is rounding where the wider dtype
    does not show it, and where it is at most twice the furthest of those rows: two outputs within d of the true one are
    within 2d of each other. A network of a wider dtype is not made where memory does not hold it, or where it does not
    run: there a finding stays what it was.

    Args:
        subject: what was audited.
        seed: of the probe's rows.

    >>> from torch import nn
    >>> Rounding(Layer(nn.Linear(4, 4).bfloat16(), 4), 0).furthest < 0.05
    True

    Source: none; the triangle inequality.
    """

    def __init__(self, subject: Layer | Model, seed: int) -> None:
        self.subject, self.seed = subject, seed

    def settled(self, found: Finding, probe: Probe, batches: int) -> Finding:
        """The finding, or as one of bits where it is no more than rounding."""
        if found.leak != "numbers" or (wide := self.wide) is None:
            return found
        try:
            again = probe(wide, torch.Generator().manual_seed(self.seed), batches, _LEFT)
            explained = again.leak in ("none", "bits") and found.difference <= 2 * self.furthest
        except Exception:  # of anybody's network, in a dtype that it was not made for: then nothing is settled
            return found
        if not explained:
            return found
        name = str(wide.dtype).removeprefix("torch.")
        what = f"{found.what}; in {name} {again.difference:.1e}: rounding that takes other experts"
        return dataclasses.replace(found, leak="bits", what=what, fix=SAME_KERNEL)

    @functools.cached_property
    def wide(self) -> Layer | Model | None:
        """The same network in a wider dtype, or None."""
        dtype = _WIDER.get(self.subject.dtype)
        module = self.subject.module
        if dtype is None or not isinstance(module, torch.nn.Module):
            return None
        need = sum(3 * one.numel() * one.element_size() for one in (*module.parameters(), *module.buffers()))
        free = free_on(self.subject.device)
        if free is not None and need > free:
            return None
        try:
            found = copy.copy(self.subject)
            found.module, found.dtype = copy.deepcopy(module).to(dtype), dtype
            if isinstance(found, Layer) and found.like is not None:
                found.like = found.like.to(dtype)
            return found
        except Exception:  # what cannot be copied, or is too large after all
            return None

    @functools.cached_property
    @torch.no_grad()
    def furthest(self) -> float:
        """The largest relative distance of a row's output to that of the wider dtype, among 256."""
        assert self.wide is not None
        chance, most = torch.Generator().manual_seed(self.seed + 1), 0.0
        for _ in range(_ROWS // _EACH):
            row_BS = self.subject.rows(_EACH, chance)
            wide_BS = row_BS.to(self.wide.dtype) if row_BS.is_floating_point() else row_BS
            most = max(most, _apart(self.subject.run(row_BS), self.wide.run(wide_BS)))
        return most


def _apart(y: Tensor, wide: Tensor) -> float:
    """The largest over rows of |y - y*| / |y*|."""
    a_BN, b_BN = y.double().flatten(1), wide.double().flatten(1)
    return float(((a_BN - b_BN).norm(dim=1) / b_BN.norm(dim=1).clamp(min=1e-30)).max())
