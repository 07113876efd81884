"""How much memory is free, and the most that was taken: as Linux says it of the machine, torch of a device."""

import contextlib
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # not there on Windows
    resource = None

# Of this process, on Linux.
_STATUS = Path("/proc/self/status")

__all__ = ["forget_peak", "free_memory", "free_on", "peak_memory"]


def peak_memory(device: torch.device) -> int | None:
    """The most bytes taken so far: by torch's tensors on a CUDA device, else by this process; None where nobody knows.

    Args:
        device: where the model is.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # What Linux says of this program alone: getrusage begins with what was taken before it was started.
    if peak := _fields(_STATUS).get("VmHWM"):
        return 1024 * peak
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return None if resource is None else unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    """Makes ``peak_memory`` count from now on, where Linux and CUDA allow it: what came before is not the next run's.

    It is the whole process that forgets, so this is for programs, not for a library call.
    """
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)
    with contextlib.suppress(OSError):
        # proc(5): the high-water mark of resident memory
        _STATUS.with_name("clear_refs").write_text("5", encoding="ascii")


def free_memory(system: Path = Path("/")) -> int | None:
    """The bytes that Linux says are available, swap included, or that the container or the process has left.

    A process has what its limit on addresses leaves it (``ulimit -v``). None elsewhere than on Linux.

    Args:
        system: where ``proc`` and ``sys`` are.
    """
    free = _meminfo(system / "proc/meminfo")
    if free is None:
        return None
    groups = (("memory.max", "memory.current", "inactive_file"),)
    groups += (("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),)
    for limit, used, cache in groups:
        found = [_number(system / "sys/fs/cgroup" / name) for name in (limit, used)]
        if found[0] is not None and found[1] is not None:
            file = (system / "sys/fs/cgroup" / limit).with_name("memory.stat")
            free = min(free, found[0] - found[1] + _fields(file).get(cache, 0))
    if resource is None:
        return max(0, free)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = system / "proc/self/statm"
    if limit != resource.RLIM_INFINITY and used.is_file():
        free = min(free, limit - int(used.read_text(encoding="ascii").split()[0]) * resource.getpagesize())
    return max(0, free)


def free_on(device: torch.device) -> int | None:
    """The bytes that a model on this device can still take; None where nothing says so.

    On CUDA that is what the driver calls free, and what torch holds there without using it.

    Args:
        device: that is there.
    """
    if device.type == "cpu":
        return free_memory()
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + idle
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return None


def _meminfo(path: Path) -> int | None:
    sizes = _fields(path)
    return 1024 * (sizes["MemAvailable"] + sizes.get("SwapFree", 0)) if "MemAvailable" in sizes else None


def _fields(path: Path) -> dict[str, int]:
    """The whole numbers of a file with a name and a number a line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pairs = [line.replace(":", " ").split() for line in lines]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdigit()}


def _number(path: Path) -> int | None:
    text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None
