"""The machine and the versions a number was measured with."""

import functools
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from turnout import __version__

__all__ = ["hardware"]


def hardware() -> dict[str, object]:
    """What a number must be read with: processor, cores, memory, accelerators, threads, versions and commit.

    Nothing in it names the machine or its user. What this system does not tell is None.

    Returns:
        JSON values: ``cpu``, ``cores`` (those this process may use), ``memory_bytes``, ``cpu_features`` (the best
        of AVX2, AVX512, AVX512-BF16, VNNI, AMX that the processor has), ``mkldnn``, ``accelerators``, ``threads``
        (of torch), ``system``, ``python``, ``torch``, ``turnout``, ``commit`` (of the checkout this turnout is
        imported from, with ``+`` when it has uncommitted changes).

    >>> sorted(set(hardware()) & {"cpu", "cores", "torch", "turnout"})
    ['cores', 'cpu', 'torch', 'turnout']

    Source: none; asks the system.
    """
    return dict(_fixed()) | {"threads": torch.get_num_threads()}


@functools.cache
def _fixed() -> tuple[tuple[str, object], ...]:
    found = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "cpu_features": _cpu_features(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "accelerators": _accelerators(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "turnout": __version__,
        "commit": _commit(),
    }
    return tuple(found.items())


def _cpu_name() -> str | None:
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.lower().startswith("model name")]
    if names:
        return names[0]
    if platform.system() == "Darwin":
        return _ask("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or None


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _memory_bytes() -> int | None:
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        # A container may be allowed less than the machine has.
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass
    return min(limits, default=None)


def _cpu_features() -> list[str]:
    words = {word for line in _cpuinfo() if line.startswith(("flags", "Features")) for word in line.split()}
    named = {
        "avx2": "AVX2",
        "avx512f": "AVX512",
        "avx512_bf16": "AVX512-BF16",
        "avx512_vnni": "VNNI",
        "amx_bf16": "AMX-BF16",
        "asimd": "NEON",
        "sve": "SVE",
    }
    return [name for flag, name in named.items() if flag in words]


def _accelerators() -> list[str]:
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ["Apple GPU"] if torch.backends.mps.is_available() else []


def _commit() -> str | None:
    # Only when this very file is tracked: an environment inside another project's checkout is not our commit.
    git: Callable[..., str | None] = functools.partial(_ask, "git", "-C", str(Path(__file__).parent))
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+" if commit and git("status", "--porcelain", "--untracked-files=no") else commit


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
