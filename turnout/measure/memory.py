"""How much memory is free, as Linux, a container and the process's own limit say it."""

import resource
from pathlib import Path

__all__ = ["free_memory"]


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
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = system / "proc/self/statm"
    if limit != resource.RLIM_INFINITY and used.is_file():
        free = min(free, limit - int(used.read_text(encoding="ascii").split()[0]) * resource.getpagesize())
    return max(0, free)


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
