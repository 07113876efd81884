"""Large pages: what the system is asked for, and that nothing else changes."""

import mmap
from pathlib import Path

import pytest
import torch

from turnout.run.pages import in_large_pages

linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system knows no large pages")


@linux
def test_neighbours_are_one_stretch_and_keep_their_numbers() -> None:
    whole = torch.arange(3 << 20)
    parts = whole[: 1 << 20], whole[1 << 20 :]
    assert 0 <= whole.nbytes - in_large_pages(parts) < 2 * mmap.PAGESIZE
    torch.testing.assert_close(whole, torch.arange(3 << 20), rtol=0, atol=0)


@linux
def test_the_kernel_heard_it() -> None:
    if not Path("/proc/self/smaps").exists():
        pytest.skip("no list of this process's memory")
    room = torch.empty(64 << 20, dtype=torch.uint8)
    in_large_pages([room])
    middle = room.data_ptr() + (32 << 20)
    flags, inside = "", False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            inside = start <= middle < end
        elif inside and first == "VmFlags:":
            flags = line
    assert " hg" in flags


def test_nothing_is_asked_for_little_or_for_other_devices() -> None:
    assert in_large_pages([torch.ones(1000), torch.empty(1 << 24, device="meta"), torch.empty(0)]) == 0
