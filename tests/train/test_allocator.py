"""The allocator keeps what a step frees."""

import subprocess
import sys

import pytest

from turnout.train.allocator import keep_freed_memory, return_freed_memory

COUNT = """
import resource, sys, torch
from turnout.train.allocator import keep_freed_memory
keep = sys.argv[1] == "keep"
assert not keep or keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""

GIVE = """
import resource, torch
from pathlib import Path
from turnout.train.allocator import keep_freed_memory, return_freed_memory
def resident():
    return resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])
keep_freed_memory()
block = torch.ones(1 << 26)
del block
kept = resident()
assert return_freed_memory()
print(kept, resident())
"""


def test_asking_twice_is_asking_once():
    assert keep_freed_memory() is keep_freed_memory()


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory.__wrapped__() is False


@pytest.mark.skipif(not keep_freed_memory(), reason="not glibc")
def test_what_was_kept_can_be_given_back():
    done = subprocess.run([sys.executable, "-c", GIVE], capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept - left > 200 << 20


def test_other_systems_have_nothing_to_give_back(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert return_freed_memory() is False


@pytest.mark.slow
@pytest.mark.skipif(not keep_freed_memory(), reason="not glibc")
def test_large_blocks_are_not_mapped_again():
    found = [
        int(subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "leave")
    ]
    assert found[0] < found[1] / 4, found
