"""The most memory that was taken: counted anew when asked, and unknown where the system does not say."""

import subprocess
import sys

import pytest
import torch

from turnout.measure import memory

CPU = torch.device("cpu")
FORGET = """
import torch
from turnout.measure.memory import forget_peak, peak_memory
cpu = torch.device("cpu")
before = peak_memory(cpu)
block = torch.ones(1 << 26)
with_block = peak_memory(cpu)
del block
forget_peak()
print(before, with_block, peak_memory(cpu))
"""


def test_the_peak_is_at_least_what_is_held() -> None:
    held = torch.ones(1 << 22)
    assert memory.peak_memory(CPU) > held.nbytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a process cannot forget")
def test_a_run_is_not_charged_with_the_one_before_it() -> None:
    done = subprocess.run([sys.executable, "-c", FORGET], capture_output=True, text=True, check=True)
    before, with_block, after = map(int, done.stdout.split())
    assert with_block >= before + 2**27
    assert after < with_block - 2**27


def test_a_system_without_the_module_knows_no_peak(monkeypatch) -> None:
    monkeypatch.setattr(memory, "resource", None)
    assert memory.peak_memory(CPU) is None
    assert memory.free_memory() is None or memory.free_memory() > 0
