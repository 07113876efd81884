"""What an audit found: one finding a probe, and all of them with where they were made."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

from turnout.fields import plain

__all__ = ["Finding", "Isolation", "Leak"]

Leak = Literal["none", "bits", "numbers", "not run"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one probe saw of a victim's output while everything but the victim changed.

    Args:
        probe: its name.
        leak: "none": one output, to the bit; "bits": differences that rounding explains; "numbers": larger ones;
            "not run": it could not run, which is no pass.
        outputs: how many different outputs the victim had.
        batches: in how many batches.
        difference: the largest relative distance to its output in the first, |y - y0| / |y0|.
        what: in words, what was changed, or why it could not run.
        fix: the nearest thing to do about it; empty where nothing is to be done.

    >>> Finding("shape", "none", 1, 40, 0.0, "other rows beside it, 0 to 63 of them", "").leak
    'none'

    Source: none; plain bookkeeping.
    """

    probe: str
    leak: Leak
    outputs: int
    batches: int
    difference: float
    what: str
    fix: str = ""


@dataclasses.dataclass(frozen=True)
class Isolation:
    """An audit: whether what a network answers one user depends on the others in the batch.

    Args:
        subject: what was audited.
        findings: one for each probe.
        bound: the relative difference that rounding is given.
        context: dtype, device, threads, versions, seed.

    >>> found = Isolation("a layer", (Finding("shape", "bits", 3, 40, 1e-7, "other rows"),), 1e-4, {})
    >>> found.leaks(), found.leaks(bits=True)
    ((), ('shape',))

    Source: Hayes et al., 2024, "Buffer Overflow in Mixture of Experts"; Yona et al., 2024, "Stealing User Prompts from
    Mixture of Experts", for what is looked for.
    """

    subject: str
    findings: tuple[Finding, ...]
    bound: float
    context: Mapping[str, Any]

    def leaks(self, *, bits: bool = False) -> tuple[str, ...]:
        """The probes that saw numbers leak, or with ``bits`` anything at all."""
        kinds = ("numbers", "bits") if bits else ("numbers",)
        return tuple(one.probe for one in self.findings if one.leak in kinds)

    @property
    def not_run(self) -> tuple[str, ...]:
        """The probes of which nothing is known."""
        return tuple(one.probe for one in self.findings if one.leak == "not run")

    def __getitem__(self, probe: str) -> Finding:
        return next(one for one in self.findings if one.probe == probe)

    def to_json(self) -> str:
        """All of it, as JSON."""
        return json.dumps({**plain(self), "leaks": self.leaks(), "bits": self.leaks(bits=True)}, indent=2)

    def __str__(self) -> str:
        about = ", ".join(f"{name} {value}" for name, value in self.context.items())
        lines = [f"{self.subject}: {about}", f"{'probe':<10}{'leaks':<9}{'outputs':>12}{'difference':>12}  what"]
        for one in self.findings:
            count = "" if one.leak == "not run" else f"{one.outputs} of {one.batches}"
            apart = "" if one.leak == "not run" else f"{one.difference:.1e}" if one.difference else "0"
            lines.append(f"{one.probe:<10}{one.leak:<9}{count:>12}{apart:>12}  {one.what}")
            lines += [f"{'':<45}fix: {one.fix}"] if one.fix else []
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        numbers, bits = self.leaks(), self.leaks(bits=True)
        unknown = f"; not known: {', '.join(self.not_run)}" if self.not_run else ""
        if numbers:
            return f"others in the batch change the answer: {', '.join(numbers)}{unknown}"
        if bits:
            return (
                f"others in the batch change no more than rounding (below {self.bound:g}): {', '.join(bits)}{unknown}"
            )
        return f"one output, to the bit, in every batch that was tried{unknown}"
