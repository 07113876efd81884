"""A victim's outputs, counted and compared while everything beside it changes."""

import torch
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.measure.isolation.finding import Finding

__all__ = ["SAME_KERNEL", "Seen"]

# What differs in the last bits alone was computed by another kernel, or in another order.
SAME_KERNEL = "with turnout.types.batch_invariant(): here; VLLM_BATCH_INVARIANT=1 in vLLM; or batches of one size"


class Seen:
    """Counts a victim's different outputs and measures how far they are from the first.

    >>> seen = Seen(1e-4)
    >>> _ = [seen.add(torch.tensor([1.0, value])) for value in (1.0, 1.0, 1.5)]
    >>> found = seen.finding("overflow", "other rows", "no limit of capacity")
    >>> found.leak, found.outputs, round(found.difference, 2)
    ('numbers', 2, 0.35)

    Source: none; plain bookkeeping.
    """

    def __init__(self, bound: float) -> None:
        self.bound, self.batches, self.difference = bound, 0, 0.0
        self._first: Tensor | None = None
        self._different: set[bytes] = set()

    def add(self, output: Tensor) -> float:
        """One more output; its relative distance to the first.

        Raises:
            UsageError: it holds what is no number: nothing can be compared with that.
        """
        own = output.detach().to("cpu", copy=True).contiguous()
        wide = own.double()
        if not bool(wide.isfinite().all()):
            got, fix = "an output that is not finite", "audit a network in a dtype in which it gives numbers"
            raise UsageError(word("the output", got=got, allowed="be finite", where="turnout.measure.audit", fix=fix))
        self._first = wide if self._first is None else self._first
        apart = float((wide - self._first).norm() / self._first.norm().clamp(min=1e-30))
        self.batches, self.difference = self.batches + 1, max(self.difference, apart)
        self._different.add(own.view(torch.uint8).numpy().tobytes())
        return apart

    def finding(self, probe: str, what: str, fix: str, *, bits: str = SAME_KERNEL) -> Finding:
        """What was seen, and the nearest fix where numbers leak, or bits.

        Raises:
            UsageError: nothing was compared.
        """
        if self.batches < 2:
            got, allowed, where = f"{self.batches} outputs", "be at least two", "turnout.measure.audit"
            raise UsageError(word(f"what {probe} compares", got=got, allowed=allowed, where=where, fix="report this"))
        outputs = len(self._different)
        leak = "none" if outputs == 1 else "bits" if self.difference <= self.bound else "numbers"
        nearest = {"none": "", "bits": bits, "numbers": fix}[leak]
        return Finding(probe, leak, outputs, self.batches, self.difference, what, nearest)
