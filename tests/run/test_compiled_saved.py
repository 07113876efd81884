"""Compiled kernels on disk: written once, read again, and never a reason not to run."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from turnout.errors import MissingExtraError
from turnout.run.compiled import compiled_here, saved, why_not_compiled
from turnout.run.compiled.engine import kernel

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import numpy as np
from numbers_of import total
before = total.made()
print(total(np.arange(5, dtype=np.float32)), sum(before.stats.cache_hits.values()))
"""
KERNEL = """
from turnout.run.compiled.engine import kernel
@kernel()
def total(row_I):
    s = row_I[0] - row_I[0]
    for i in range(row_I.shape[0]):
        s += row_I[i]
    return s
"""


@pytest.fixture
def start(tmp_path, compiled):
    """Starts a process that calls one small kernel, and keeps it in a folder of this test."""
    (tmp_path / "numbers_of.py").write_text(KERNEL)

    def started(**more: str) -> subprocess.Popen:
        path = os.pathsep.join([str(ROOT), str(tmp_path)])
        given = {**os.environ, "PYTHONPATH": path, "TURNOUT_CACHE": str(tmp_path / "kept"), **more}
        command = [sys.executable, "-c", PROGRAM]
        return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return started


def said(process: subprocess.Popen) -> list[str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and not err, err
    return out.split()


@pytest.mark.slow
def test_two_that_start_at_once_and_one_that_finds_it_there(start, tmp_path):
    both = [start(), start()]
    assert [said(each)[0] for each in both] == ["10.0", "10.0"]
    assert said(start()) == ["10.0", "1"]
    (code,) = (tmp_path / "kept").rglob("*.nbc")
    code.write_bytes(b"no code")  # a disk that was full
    assert said(start()) == ["10.0", "0"]


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_passed_over(start, tmp_path):
    (tmp_path / "kept").write_text("a file where the folder should be")
    assert said(start()) == ["10.0", "0"]
    (tmp_path / "kept").unlink()
    (tmp_path / "kept").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    assert said(start())[0] == "10.0"
    assert not list(tmp_path.rglob("__pycache__/*.nbi")), "numba's own choice of a folder"


@pytest.mark.slow
def test_what_others_could_have_written_is_not_read(start, tmp_path):
    assert said(start()) == ["10.0", "0"]
    (tmp_path / "kept" / "kernels").chmod(0o777)
    process = start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and out.split() == ["10.0", "0"]
    assert err.count("others can write to") == 1 and "chmod go-w" in err
    (tmp_path / "kept" / "kernels").chmod(0o700)
    assert said(start()) == ["10.0", "1"]


def test_zero_switches_them_off(monkeypatch):
    monkeypatch.setenv("TURNOUT_COMPILED", "0")
    assert not compiled_here() and why_not_compiled() == "TURNOUT_COMPILED=0 is set"

    @kernel()
    def same(x):
        return x

    with pytest.raises(MissingExtraError, match="TURNOUT_COMPILED=0"):
        same(np.ones(1))


def test_import_turnout_loads_no_numba():
    code = "import sys, turnout.run.compiled.experts; print('numba' in sys.modules)"
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output([sys.executable, "-c", code], env=given, text=True, timeout=300).strip() == "False"


def test_kernels_are_kept_by_all_that_writes_them(monkeypatch, compiled):
    """Also what no kernel names: helpers of those that write vectors, and this version of turnout."""
    made, read = SimpleNamespace(py_func=len), saved._text

    def place() -> str:
        saved.keep(made, [], False)
        return made._cache.cache_path

    places = [place(), place()]
    monkeypatch.setattr(saved, "__version__", "another")
    places.append(place())
    monkeypatch.setattr(saved, "_text", lambda file: read(file) + "#" * file.endswith("vectors.py"))
    places.append(place())
    assert places[0] == places[1] and len(set(places)) == 3


SUMS = """
import hashlib
import torch
from turnout.run.compiled.gates import activation_slopes
g = torch.Generator().manual_seed(0)
hidden, grad, weight = torch.randn(33, 96, generator=g), torch.randn(33, 48, generator=g), torch.rand(33, generator=g)
made = torch.empty(33, 48), torch.empty(33, 96), torch.empty(33)
activation_slopes("swiglu", hidden, grad, weight, *made)
print(hashlib.sha256(b"".join(one.numpy().tobytes() for one in made)).hexdigest())
"""


@pytest.mark.slow
def test_the_process_that_compiles_and_those_that_read_have_the_same_bits(tmp_path, compiled):
    """Or a run that goes on would not be the run that it was: parts that may be summed otherwise are never called."""
    given = {**os.environ, "PYTHONPATH": str(ROOT), "TURNOUT_CACHE": str(tmp_path / "kept")}
    command = [sys.executable, "-c", SUMS]
    first, second = (subprocess.check_output(command, env=given, text=True, timeout=300) for _ in range(2))
    assert first == second and list((tmp_path / "kept" / "kernels").iterdir())
