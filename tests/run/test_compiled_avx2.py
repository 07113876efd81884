"""Kernels compiled for a processor with AVX2 and no more: the same tests, in a process and a cache of their own."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from house import ROOT

pytestmark = pytest.mark.usefixtures("compiled")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is of x86")
def test_rows_are_the_same_with_vectors_of_eight(tmp_path: Path) -> None:
    told = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "TURNOUT_CACHE": str(tmp_path)}
    environment = {**os.environ, **told, "PYTHONPATH": str(ROOT)}
    code = "from turnout.run.compiled.lanes import LANES; assert LANES.made() == 8"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    file = str(ROOT / "tests" / "run" / "test_compiled_rows.py")
    done = subprocess.run([*command, file], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout
