"""The most memory that was taken: counted anew when asked, and unknown where the system does not say."""

import subprocess
import sys
from pathlib import Path

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere there is no other way to know")
def test_a_program_is_not_charged_with_the_one_that_started_it() -> None:
    held = torch.ones(1 << 27)
    code = "import torch; from turnout.measure.memory import peak_memory; print(peak_memory(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < held.nbytes + 2**27


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a process cannot forget")
def test_a_run_is_not_charged_with_the_one_before_it() -> None:
    done = subprocess.run([sys.executable, "-c", FORGET], capture_output=True, text=True, check=True)
    before, with_block, after = map(int, done.stdout.split())
    assert with_block >= before + 2**27
    assert after < with_block - 2**27


def test_a_system_without_the_module_knows_no_peak(monkeypatch) -> None:
    monkeypatch.setattr(memory, "resource", None)
    monkeypatch.setattr(memory, "_STATUS", Path("/no/such/file"))
    assert memory.peak_memory(CPU) is None
    assert memory.free_memory() is None or memory.free_memory() > 0
