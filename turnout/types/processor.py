"""Which processor this is: what a measured number is read with, and what a calibration is kept for."""

import dataclasses
import functools
import platform
import re
import subprocess
from pathlib import Path

import torch

__all__ = ["Processor", "processor"]


@dataclasses.dataclass(frozen=True)
class Processor:
    """A processor, as far as the speed of its products goes.

    Args:
        name: as the system gives it, "AMD EPYC"; it may stay the same over several generations.
        kind: maker, family and the widest vectors that torch uses, "AuthenticAMD 25 AVX512": one microarchitecture.
        model: within the family; empty where the system does not tell.

    >>> str(Processor("AMD EPYC", "AuthenticAMD 25 AVX512", "17"))
    'AMD EPYC (AuthenticAMD 25 AVX512, model 17)'

    Source: none; plain bookkeeping.
    """

    name: str
    kind: str
    model: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}{', model ' + self.model if self.model else ''})"


@functools.cache
def processor() -> Processor:
    """The processor that this process runs on.

    >>> processor() == processor() and bool(processor().kind)
    True

    Source: none; asks the system.
    """
    told = _told()
    name = told.get("model name") or _apple() or platform.processor() or platform.machine() or "unknown"
    maker = f"{told['vendor_id']} {told.get('cpu family', '')}" if "vendor_id" in told else platform.machine()
    wide = torch.backends.cpu.get_cpu_capability()
    return Processor(re.sub(r"\s+", " ", name), f"{maker} {wide}", told.get("model", ""))


def _told() -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _apple() -> str:
    if platform.system() != "Darwin":
        return ""
    try:
        ask = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
